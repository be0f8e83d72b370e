"""Scratch folders that do not outlast their process, not even one that is killed.

Every process has one folder, which it locks while it lives. It removes the folder when it ends; a folder whose process
was killed goes when the next run begins, or the next process asks for its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ziplm_deploy.machine.locks import FileLock, private_folder, temporary_root

LOCK = ".lock"


class _Scratch:
    """The folder of this process."""

    def __init__(self, root: Path) -> None:
        self.process = os.getpid()
        with _tidied(root):
            self.path = Path(tempfile.mkdtemp(prefix=f"process-{self.process}-", dir=root))
            self._lock = FileLock(self.path / LOCK)
            self._lock.acquire()

    @property
    def is_usable(self) -> bool:
        """Whether it is this process's, not that of one it was forked from, and still there."""
        return self.process == os.getpid() and self.path.is_dir() and self.path.parent == temporary_root()

    def remove(self) -> None:
        if self.process == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.release()


_own: _Scratch | None = None


def scratch_root() -> Path:
    """The scratch folder of this process; make temporary files and folders in it.

    Raises:
        StorageError: the system's folder for temporary files cannot be used.
    """
    global _own
    if _own is None or not _own.is_usable:
        _own = _Scratch(temporary_root())
    return _own.path


def remove_abandoned() -> None:
    """Remove the scratch folders of processes that are gone; raises as :func:`scratch_root`."""
    if temporary_root().exists():
        with _tidied(temporary_root()):
            pass


@contextlib.contextmanager
def _tidied(root: Path) -> Iterator[None]:
    """Have the folders to oneself, without those of processes that are gone.

    Otherwise somebody could take a folder that is not locked yet for one that was left behind.
    """
    everybody = FileLock(private_folder(root) / LOCK)
    everybody.acquire(wait=True)
    try:
        for folder in root.glob("process-*") if everybody.enforced else ():
            lock = FileLock(folder / LOCK)
            if lock.acquire():
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
        yield
    finally:
        everybody.release()


def _remove_own() -> None:
    if _own is not None:
        _own.remove()


atexit.register(_remove_own)
