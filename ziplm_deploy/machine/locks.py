"""Locks between processes: files that at most one of them holds, and that the system frees when it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ziplm_deploy.errors import StorageError

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # said by file systems without locks


class FileLock:
    """A lock on a file, which names the process that holds it. However that ends, the system frees the lock.

    On a file system without locks everybody gets it; ``enforced`` then is False.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.enforced = True
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; False if another holds it and ``wait`` does not.

        Raises:
            StorageError: the file cannot be made.
        """
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StorageError(
                    f"expected to write {self.path}, found: {error.strerror or error}; choose another folder"
                ) from error
            try:
                taken = self._lock(descriptor, wait)
            except BaseException:  # an interrupt while it waits
                os.close(descriptor)
                raise
            if not taken:
                os.close(descriptor)
                return False
            if self._is_in_place(descriptor):
                break
            os.close(descriptor)  # who held it has removed the file: another one may be locked by now
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def _lock(self, descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self.enforced = False
        return True

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    @property
    def holder(self) -> str:
        """The process that has the lock, in words."""
        try:
            return self.path.read_text(encoding="utf-8").strip() or "another process"
        except (OSError, ValueError):
            return "another process"

    def release(self, *, remove: bool = False) -> None:
        """Free the lock, and ``remove`` its file; safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def private_folder(path: Path) -> Path:
    """A folder of this user alone, made if there is none.

    Raises:
        StorageError: it belongs to somebody else, or cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise StorageError(
            f"expected to make the folder {path}, found: {error.strerror or error}; set TMPDIR to a folder of your own"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StorageError(
            f"expected a folder of this user at {path}, found one of user {found.st_uid}; set TMPDIR to one of your own"
        )
    return path


def temporary_root() -> Path:
    """Folder for this user's temporary files."""
    return Path(tempfile.gettempdir()) / f"ziplm-deploy-{os.getuid()}"


def _lock_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime) / "ziplm-deploy"
    return temporary_root()


@contextlib.contextmanager
def timing_alone(note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Let no two processes of this user time models at once: all workers run on the same CPUs.

    Waits for the one that does; ``note`` is told so.
    """
    lock = FileLock(private_folder(_lock_folder()) / "timing.lock")
    if not lock.acquire():
        if note is not None:
            note(f"waits until another measurement on this machine has ended ({lock.holder})")
        lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
