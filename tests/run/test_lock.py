"""One run a folder; what a killed one left is removed, and what belongs to somebody else is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import save_dense
from tests.helpers.pipeline import recipe, write_rows
from ziplm_deploy import pipeline
from ziplm_deploy.errors import DataError, FolderInUseError, StorageError
from ziplm_deploy.run.lock import RunLock, remove_temporary

HOLD = """
import sys
from pathlib import Path
from ziplm_deploy.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]), print)
print("held", flush=True)
sys.stdin.readline()
"""


def silent(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    save_dense(tmp_path / "model", task="text-classification", num_hidden_layers=1)
    for name, seed in (("train", 0), ("test", 1)):
        write_rows(tmp_path / f"{name}.jsonl", 20, seed)
    return tmp_path


def test_a_second_run_is_refused_and_told_of_the_first(made: Path) -> None:
    folder = made / "runs" / "tiny"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (folder / ".model.onnx.0123.tmp").touch()
        with pytest.raises(FolderInUseError, match=rf"found one: process {process.pid} on .*; wait until"):
            pipeline.begin(recipe(made))
        assert (folder / ".model.onnx.0123.tmp").exists()  # it is the first one's
        process.kill()
    with pipeline.begin(recipe(made)):
        assert not (folder / ".model.onnx.0123.tmp").exists()


def test_a_run_that_is_over_leaves_no_lock_and_one_that_made_nothing_no_folder(made: Path) -> None:
    with pipeline.begin(recipe(made)) as run:
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
            pipeline.begin(recipe(made))
        run.folder.save()
    assert sorted(path.name for path in (made / "runs" / "tiny").iterdir()) == ["manifest.json", "recipe.yaml"]
    with pipeline.begin(recipe(made, name="other")):
        assert (made / "runs" / "other").is_dir()
    assert not (made / "runs" / "other").exists()
    with pytest.raises(DataError):
        pipeline.run_pipeline(recipe(made, name="other", data={"calibration": "./none.jsonl"}))
    assert not (made / "runs" / "other").exists()


def test_only_the_first_process_of_a_launch_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunLock(tmp_path / "run", silent)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    RunLock(tmp_path / "run", silent).release()
    assert (tmp_path / "run" / ".lock").exists()
    first.release()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"expected a folder for the run at .*file/run"):
        RunLock(tmp_path / "file" / "run", silent)


def test_a_file_system_without_locks_is_said_and_nothing_of_another_run_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ziplm_deploy.machine.locks.fcntl.flock", refuse)
    (tmp_path / ".model.onnx.0123.tmp").touch()
    said: list[str] = []
    RunLock(tmp_path, said.append).release()
    assert ["no locks" in text for text in said] == [True]
    assert (tmp_path / ".model.onnx.0123.tmp").exists()


def test_unfinished_files_and_folders_are_removed_and_no_others(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".kept.tmp").touch()
    folder = tmp_path / "run"
    for path in ("1.5x/.model.onnx.01.tmp", ".2x.01.tmp/deep/file", "pruning/.2x.tmp/file"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).touch()
    kept = {"manifest.json", ".hidden", "notes.tmp", "1.5x/model.onnx"}
    for name in kept:
        (folder / name).touch()
    (folder / "link").symlink_to(elsewhere)
    (folder / ".link.tmp").symlink_to(elsewhere)
    remove_temporary(folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert found == kept
    assert (elsewhere / ".kept.tmp").exists()
