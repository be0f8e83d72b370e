"""Whole files or none: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on any failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named before it exists: an interrupt while it is made must find the name, or the file stays.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)  # in the mode that the umask grants, which stays that of the file
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(NotADirectoryError):  # then nothing was made, and the error on its way says so
            temporary.unlink(missing_ok=True)
