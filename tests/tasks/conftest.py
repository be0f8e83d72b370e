"""The tokenizer of the tiny models."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.models import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
