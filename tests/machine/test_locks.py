"""Two processes never do at once what only one may, and what a killed one leaves is removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ziplm_deploy.errors import StorageError
from ziplm_deploy.machine import scratch
from ziplm_deploy.machine.locks import TIMING_VARIABLE, FileLock, private_folder, timing_alone


def python(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A process that runs ``code``."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = """
    import sys
    from pathlib import Path
    from ziplm_deploy.machine.locks import FileLock
    lock = FileLock(Path(sys.argv[1]))
    print(lock.acquire(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock ``lock``."""
    with python(HOLD, tmp_path / "lock") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_lock_of_another_process_is_not_taken_and_its_holder_is_named(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    lock = FileLock(tmp_path / "lock")
    assert not lock.acquire()
    assert f"process {other.pid} on " in lock.holder


def test_a_killed_process_holds_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    assert f"process {os.getpid()} on " in lock.holder


def test_a_lock_whose_file_its_holder_removes_is_one_all_the_same(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    first.release(remove=True)
    assert not (tmp_path / "lock").exists()
    assert second.acquire()
    assert not first.acquire()
    second.release()
    second.release()
    assert first.acquire()


def test_a_timing_waits_for_another_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMING_VARIABLE, str(tmp_path / "timing.lock"))
    said: list[str] = []
    with python(HOLD, tmp_path / "timing.lock") as process:
        assert process.stdout is not None
        process.stdout.readline()

        def note(text: str) -> None:
            said.append(text)
            process.kill()

        with timing_alone(note):
            assert process.wait() == -signal.SIGKILL
    assert [f"process {process.pid} on " in text for text in said] == [True]
    with timing_alone(said.append):  # nobody is there any more
        pass
    assert len(said) == 1


def test_a_timing_lock_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMING_VARIABLE, str(tmp_path / "timing.lock"))
    with pytest.raises(ZeroDivisionError), timing_alone():
        print(1 / 0)
    assert FileLock(tmp_path / "timing.lock").acquire()


def test_all_processes_of_a_machine_wait_for_one_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a login shell, cron or a batch job says about temporary files."""
    monkeypatch.delenv(TIMING_VARIABLE)
    taken: list[FileLock] = []

    def acquire(lock: FileLock, *, wait: bool = False) -> bool:
        taken.append(lock)
        return True

    monkeypatch.setattr(FileLock, "acquire", acquire)
    for variable, value in (("XDG_RUNTIME_DIR", "/run/user/7"), ("TMPDIR", "/scratch/job"), ("HOME", "/elsewhere")):
        with timing_alone():
            pass
        monkeypatch.setenv(variable, value)
    with timing_alone():
        pass
    assert {lock.path for lock in taken} == {Path("/tmp/ziplm-deploy-timing.lock")}


def test_a_lock_of_another_user_locks_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a folder like /tmp that this user may only read; root may all, so that opening is imitated."""
    path, opened = tmp_path / "lock", os.open
    path.write_text("process 7 on elsewhere", encoding="utf-8")

    def only_reading(name: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", only_reading)
    first, second = (FileLock(path, for_all_users=True) for _ in range(2))
    assert first.acquire()
    assert not second.acquire()
    assert path.read_text(encoding="utf-8") == "process 7 on elsewhere"
    first.release()
    assert second.acquire()


def test_all_users_may_write_to_their_common_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    lock, before = FileLock(tmp_path / "lock", for_all_users=True), os.umask(0o077)
    try:
        assert lock.acquire()
    finally:
        os.umask(before)
    assert lock.path.stat().st_mode & 0o777 == 0o666
    with pytest.raises(StorageError, match=TIMING_VARIABLE):
        FileLock(tmp_path / "link", for_all_users=True).acquire()
    assert not (tmp_path / "victim").exists()


def test_a_folder_that_is_a_link_or_a_file_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(StorageError, match="TMPDIR"):
            private_folder(tmp_path / name)
    assert private_folder(tmp_path / "new").stat().st_mode & 0o777 == 0o700


SCRATCH = """
    import os, sys
    from pathlib import Path
    from ziplm_deploy.machine.scratch import scratch_root
    (scratch_root() / "large").touch()
    print(scratch_root(), flush=True)
    sys.stdin.readline()
"""


def test_scratch_goes_with_its_process_or_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    processes = [python(SCRATCH) for _ in range(3)]
    killed, ended, living = (Path(process.stdout.readline().strip()) for process in processes)  # type: ignore[union-attr]
    assert all((path / "large").exists() for path in (killed, ended, living))
    processes[0].kill()
    processes[0].communicate()
    processes[1].communicate("\n")
    assert (killed.exists(), ended.exists()) == (True, False)
    own = scratch.scratch_root()
    assert own.parent == killed.parent
    assert (killed.exists(), living.exists()) == (False, True)
    assert scratch.scratch_root() == own
    processes[2].kill()
    processes[2].communicate()
    scratch.remove_abandoned()
    assert [path.name for path in own.parent.glob("process-*")] == [own.name]
