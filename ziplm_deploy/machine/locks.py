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

TIMING_VARIABLE = "ZIPLM_TIMING_LOCK"  # names another file, for runs that share no CPU
# One place for all: a login shell, a batch job and cron differ in TMPDIR and XDG_RUNTIME_DIR.
_TIMING_LOCK = "/tmp/ziplm-deploy-timing.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # said by file systems without locks


class FileLock:
    """A lock on a file, which names the process that holds it. However that ends, the system frees the lock.

    On a file system without locks everybody gets it; ``enforced`` then is False. A lock ``for_all_users`` of a machine
    is one file, whoever made it; who may not write to it locks it all the same.
    """

    def __init__(self, path: Path, *, for_all_users: bool = False) -> None:
        self.path, self._for_all_users = path, for_all_users
        self.enforced = True
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; False if another holds it and ``wait`` does not.

        Raises:
            StorageError: the file cannot be made.
        """
        while True:
            try:
                descriptor = self._open()
            except OSError as error:
                another = f"name another file in {TIMING_VARIABLE}" if self._for_all_users else "choose another folder"
                raise StorageError(
                    f"expected to write {self.path}, found: {error.strerror or error}; {another}"
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
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def _open(self) -> int:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        if not self._for_all_users:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o600)
        with contextlib.suppress(PermissionError):  # of a file of another user, in a folder where all may make some
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
            if os.fstat(descriptor).st_uid == os.getuid() and not os.fstat(descriptor).st_size:
                os.fchmod(descriptor, 0o666)  # of a new one, whatever the umask says
            return descriptor
        with contextlib.suppress(PermissionError):
            return os.open(self.path, os.O_RDWR | flags)
        return os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | flags)

    def _lock(self, descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (*UNSUPPORTED, errno.EBADF):  # the last: NFS, of a file that may only be read
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


def _timing_lock() -> Path:
    """The file that all lock; one of this user's own where nobody may write to the common place."""
    named = os.environ.get(TIMING_VARIABLE)
    common = Path(named or _TIMING_LOCK)
    if named or common.exists() or os.access(common.parent, os.W_OK | os.X_OK):
        return common
    return private_folder(temporary_root()) / "timing.lock"


@contextlib.contextmanager
def timing_alone(note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Let no two processes of this machine time models at once, whoever began them: all workers run on the same CPUs.

    Waits for the one that does; ``note`` is told so.
    """
    lock = FileLock(_timing_lock(), for_all_users=True)
    if not lock.acquire():
        if note is not None:
            note(f"waits until another measurement on this machine has ended ({lock.holder})")
        lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
