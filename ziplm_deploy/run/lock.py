"""One run at a time in a folder; what a killed one has left there is removed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from ziplm_deploy.errors import FolderInUseError, StorageError
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.locks import FileLock
from ziplm_deploy.progress import Note


class RunLock:
    """A run folder is this process's from here until :meth:`release`; of several of a launch, it is the first one's.

    Folders that had to be made for the lock go with it, unless something was put into them.

    Raises:
        FolderInUseError: another run is in this folder; names its process.
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, note: Note) -> None:
        self._made: list[Path] = []
        self._lock = FileLock(folder / ".lock")
        if not distributed.is_first():
            return
        try:
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"expected a folder for the run at {folder}, found: {error.strerror or error}; choose another "
                "output_dir or name"
            ) from error
        if not self._lock.acquire():
            raise FolderInUseError(
                f"expected no other run in {folder}, found one: {self._lock.holder}; wait until it has ended, or "
                "choose another output_dir or name"
            )
        if self._lock.enforced:
            remove_temporary(folder)
        else:
            note(f"the file system of {folder} has no locks: run one command at a time in it")

    def release(self) -> None:
        """Let others in; safe to call twice."""
        self._lock.release(remove=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is in use now
                folder.rmdir()
        self._made = []


def remove_temporary(folder: Path) -> None:
    """Remove unfinished files and folders, which a killed process has left: ``.NAME.tmp``."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*files, *folders) if _is_temporary(name)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        folders[:] = [name for name in folders if not _is_temporary(name)]


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
