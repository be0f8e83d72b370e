"""Safetensors files that are written tensor by tensor, so that no more than one of them has to be in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
PADDING = "padding"  # a tensor that nobody reads: the format has no gaps, and readers want numbers aligned


class TensorFileWriter:
    """Writes tensors in the order in which they come; call :meth:`finish` after the last.

    Those of 8-byte numbers wait for the end, where they are aligned: let them be small.

    Args:
        file: open for writing, empty.
        header_bytes: room for names, shapes and metadata, which come last and stand first.
    """

    def __init__(self, file: BinaryIO, header_bytes: int) -> None:
        self._file, self._room = file, 8 * math.ceil(header_bytes / 8)
        self._entries: dict[str, dict[str, object]] = {}
        self._wide: dict[str, Tensor] = {}
        self._position = 0
        file.write(bytes(8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            OSError: that fails.
            ValueError: its numbers are none of :data:`DTYPES`.
        """
        if tensor.dtype not in DTYPES:
            raise ValueError(f"expected {name} of {', '.join(map(str, DTYPES))}, found {tensor.dtype}")
        if tensor.element_size() == 8:
            self._wide[name] = tensor.detach().clone()
        else:
            self._write(name, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what waited, and the header.

        Raises:
            ValueError: it takes more than the room for it.
            OSError: the file cannot be written.
        """
        if self._wide and self._position % 8:
            self._write(PADDING, torch.zeros(1))
        for name, tensor in self._wide.items():
            self._write(name, tensor)
        header = json.dumps({"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"expected a header of {self._room} bytes at most, found {len(header)}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))

    def _write(self, name: str, tensor: Tensor) -> None:
        values = tensor.detach().contiguous().numpy()
        self._file.write(values.reshape(-1).view(np.uint8).data)
        end = self._position + values.nbytes
        shape, offsets = list(values.shape), [self._position, end]
        self._entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        self._position = end
