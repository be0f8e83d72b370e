"""Files that are written whole or not at all: whose they are to read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ziplm_deploy.artifacts import check_writable, write_text
from ziplm_deploy.errors import StorageError


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_grants(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "private?")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_path_is_checked_without_being_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    check_writable(tmp_path / "a.txt")
    check_writable(tmp_path / "new" / "b.txt")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "new"]
    for path in (tmp_path, tmp_path / "a.txt" / "below", Path("/proc/none/c.txt"), tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="expected"):
            check_writable(path)
