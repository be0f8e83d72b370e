"""Whole files and folders or none: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def weights_beside(path: Path) -> Path:
    """The file that an ONNX file of more than 2 GB keeps its large weights in; it need not exist."""
    return path.with_name(f"{path.name}.data")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on any failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named before it exists: an interrupt while it is made must find the name, or the file stays.
    temporary = temporary_name(path)
    try:
        temporary.touch(exist_ok=False)  # in the mode that the umask grants, which stays that of the file
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(NotADirectoryError):  # then nothing was made, and the error on its way says so
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_pair(path: Path, companion: Path) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths of a file and of one that it refers to; on success both take their places.

    An old ``path`` goes first and the new one comes last: whoever finds the file finds what it refers to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, beside = temporary_name(path), temporary_name(companion)
    try:
        for each in (temporary, beside):
            each.touch(exist_ok=False)
        yield temporary, beside
        for each in (temporary, beside):
            _sync(each)
        path.unlink(missing_ok=True)
        beside.replace(companion)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(NotADirectoryError):  # then nothing was made, and the error on its way says so
            for each in (temporary, beside):
                each.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``; on success it takes its place, on any failure it is removed.

    All of it is fsynced before. The old folder is moved away first and then removed: there never is a mixture.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    making, old = temporary_name(folder), temporary_name(folder)
    try:
        making.mkdir()
        yield making
        sync_folder(making)
        if folder.exists():
            folder.rename(old)
        making.rename(folder)
        _sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in (making, old):
            shutil.rmtree(path, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses, as ``.NAME.RANDOM.tmp``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sync_folder(folder: Path) -> None:
    """Have all files and folders below ``folder`` on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
