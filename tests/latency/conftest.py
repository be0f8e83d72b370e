"""Fixtures of the tests of tables and benchmarks."""

from __future__ import annotations

import pytest

from ziplm_deploy.latency import profile


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models have one process each: several take long to start, and other tables here have them."""
    monkeypatch.setattr(profile, "WHOLE_PROCESSES", 1)
