"""Data sets from anywhere: no script of theirs runs, whatever the environment allows."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.data import read_rows


@pytest.mark.parametrize(("version", "options"), [("3.6.0", {"trust_remote_code": False}), ("5.2.0", {})])
def test_scripts_of_data_sets_are_not_run(
    monkeypatch: pytest.MonkeyPatch, version: str, options: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    def load_dataset(*names: object, **given: Any) -> list[dict[str, str]]:
        seen.update(given)
        return [{"text": "a cat"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "__version__", version)
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    assert read_rows("somebodys/data", split="train") == [{"text": "a cat"}]
    assert seen == {"split": "train", **options}


def test_what_a_library_says_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise RuntimeError("x" * 10**6)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="RuntimeError") as caught:
        read_rows("somebodys/data", split="train")
    assert len(str(caught.value)) < 5000


def test_a_few_kilobytes_that_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    block = b"a,b\n" * (1 << 20)
    path.write_bytes(b"".join(packer.compress(block) for _ in range(40)) + packer.flush())
    with pytest.raises(DataError, match="more than 100 times its size unpacked"):
        read_rows(str(path), split="train")
    small = gzip.compress(b"text\n" + b"the cat\n" * 100_000)  # repetition of an honest size
    path.write_bytes(small)
    assert len(read_rows(str(path), split="train")) == 100_000
