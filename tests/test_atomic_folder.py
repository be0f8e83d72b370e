"""Folders take their place whole, on the disk, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ziplm_deploy.artifacts import atomic_folder, atomic_path
from ziplm_deploy.errors import StorageError


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "2x"
    for name in ("old", "new"):
        with atomic_folder(folder) as making:
            (making / "deep").mkdir()
            (making / "deep" / name).write_text(name, encoding="utf-8")
            assert making.parent == tmp_path
            assert making.name.startswith(".2x.")
    assert [path.name for path in (folder / "deep").iterdir()] == ["new"]
    assert os.listdir(tmp_path) == ["2x"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_folder(tmp_path: Path, failure: type[BaseException]) -> None:
    folder = tmp_path / "2x"
    folder.mkdir()
    (folder / "old").touch()

    def fail() -> None:
        with atomic_folder(folder) as making:
            (making / "new").touch()
            raise failure

    with pytest.raises(failure):
        fail()
    assert (os.listdir(tmp_path), os.listdir(folder)) == (["2x"], ["old"])


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "2x"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == folder and (path / "new").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Input/output error"), atomic_folder(folder) as making:
        (making / "new").touch()
    assert (os.listdir(tmp_path), os.listdir(folder)) == (["2x"], ["old"])


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with atomic_folder(tmp_path / "2x") as making:
        (making / "deep").mkdir()
        (making / "deep" / "file").touch()
        expected = {str(path) for path in (making, making / "deep", making / "deep" / "file", tmp_path)}
    assert set(synced) == expected
    synced.clear()
    with atomic_path(tmp_path / "file"):
        pass
    assert len(synced) == 2
    assert synced[1] == str(tmp_path)  # its new name, too
