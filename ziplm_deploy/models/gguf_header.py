"""What a GGUF file says before its weights, walked within the bytes that it has.

The package ``gguf`` believes counts and lengths, which a damaged file may give any value; here each must fit.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
MAX_ITEMS = 1 << 23  # values of all lists together; a vocabulary of 262,144 tokens has about a million
MAX_DEPTH = 4  # of lists in lists
MAX_DIMENSIONS = 8
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
_TEXT, _LIST = 8, 9


def check_header(file: Path) -> None:
    """Refuse a file whose counts and lengths do not fit into it, or that names a key twice.

    Raises:
        OSError: it cannot be read.  ValueError: it is no GGUF file, or damaged; says where.
    """
    with file.open("rb") as stream:
        if not stream.read(1):
            raise ValueError("an empty file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Walk(content).header()


class _Walk:
    """A position in a file, which never leaves it."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._items = content, 4, 0
        self._order = "<"

    def header(self) -> None:
        if self._content[:4] != MAGIC:
            raise ValueError(f"{self._content[:4]!r} where {MAGIC!r} should stand")
        if not self._number("I") & 0xFFFF:  # written on a machine of the other byte order
            self._order = ">"
        n_tensors, n_keys = self._number("Q"), self._number("Q")
        self._require(n_keys, 13, "keys")
        seen: set[bytes] = set()
        for _ in range(n_keys):
            key = self._text()
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} twice")
            seen.add(key)
            self._value(self._number("I"), 0)
        self._require(n_tensors, 24, "tensors")
        for _ in range(n_tensors):
            self._text()
            n_dimensions = self._number("I")
            if n_dimensions > MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {n_dimensions} dimensions")
            self._skip(8 * n_dimensions + 12)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._text()
        elif kind == _LIST and depth < MAX_DEPTH:
            inner, count = self._number("I"), self._number("Q")
            self._items += count
            if self._items > MAX_ITEMS:
                raise ValueError(f"lists of more than {MAX_ITEMS} values")
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
                return
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            raise ValueError(f"a value of type {kind}, or lists in lists, at byte {self._at}")

    def _text(self) -> bytes:
        length = self._number("Q")
        self._skip(length)
        return self._content[self._at - length : self._at]

    def _number(self, code: str) -> int:
        size = struct.calcsize(code)
        self._skip(size)
        value: int = struct.unpack_from(f"{self._order}{code}", self._content, self._at - size)[0]
        return value

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > len(self._content) - self._at:
            raise ValueError(f"{n_bytes} bytes asked for at byte {self._at} of {len(self._content)}")
        self._at += n_bytes

    def _require(self, count: int, n_bytes: int, what: str) -> None:
        """Refuse more entries of at least ``n_bytes`` each than the rest of the file has room for."""
        if count * n_bytes > len(self._content) - self._at:
            raise ValueError(f"{count} {what} in a file of {len(self._content)} bytes")
