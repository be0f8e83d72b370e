"""Whoever reads what is printed may go away in the middle of a write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ziplm_deploy.artifacts import write_bytes_with


def test_a_reader_of_the_output_that_goes_away_is_no_storage_error(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # as print does then

    with pytest.raises(BrokenPipeError):
        write_bytes_with(tmp_path / "a.bin", write)
    assert os.listdir(tmp_path) == []
