"""GGUF files written tensor by tensor: at no time is more than one tensor in memory beside the model.

Vectors stay in float32, as llama.cpp wants them. Matrices get the type that is asked for; quantized types store blocks
of 32 values of a row, so a matrix whose rows are no multiple of that stays in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from exporters.encoder import ExportError
from exporters.files import atomic_path

FileType = Literal["F16", "Q8_0", "Q4_0"]
BLOCK = 32  # values that share a scale in Q8_0 and Q4_0
# A block's scale takes two bytes.
VALUE_BYTES: dict[FileType, float] = {"F16": 2.0, "Q8_0": (BLOCK + 2) / BLOCK, "Q4_0": (BLOCK / 2 + 2) / BLOCK}
_MAX_FLOAT16 = 65504.0


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file: ``values`` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: Literal["F32"] | FileType
    values: Callable[[], torch.Tensor]


def gguf_package() -> Any:
    """The package ``gguf`` of llama.cpp.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ExportError(
            "expected the installed package gguf, which writes GGUF files, found none; "
            "run: pip install 'ziplm-deploy[llamacpp]'"
        ) from error
    return gguf


def vector(name: str, values: torch.Tensor) -> FileTensor:
    """A norm's weight or a bias, ``[size]``, in float32."""
    return FileTensor(name, tuple(values.shape), "F32", lambda: values)


def matrix(name: str, shape: tuple[int, int], file_type: FileType, values: Callable[[], torch.Tensor]) -> FileTensor:
    """A matrix ``[out, in]`` in ``file_type``, or in float16 where ``in`` is no multiple of a block."""
    return FileTensor(name, shape, file_type if shape[1] % BLOCK == 0 else "F16", values)


def write_gguf(path: Path, architecture: str, metadata: Callable[[Any], None], tensors: Sequence[FileTensor]) -> None:
    """Write a GGUF file; whole or not at all.

    Args:
        path: the file to write; an old one is replaced.
        architecture: what llama.cpp is to build of it.
        metadata: adds the keys to a ``gguf.GGUFWriter``.
        tensors: in the order of the file.

    Raises:
        ExportError: the package ``gguf`` is missing, or a weight is not finite or too large for float16.
        OSError: the file cannot be written.
    """
    gguf = gguf_package()
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        metadata(writer)
        for tensor in tensors:
            _announce(gguf, writer, tensor)
        writer.write_header_to_file()
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_stored(gguf, tensor))
        finally:
            writer.close()


def in_float16(tensors: Iterable[FileTensor]) -> tuple[str, ...]:
    """Names of the tensors that a file holds in float16."""
    return tuple(tensor.name for tensor in tensors if tensor.type == "F16")


def _announce(gguf: Any, writer: Any, tensor: FileTensor) -> None:
    kind = gguf.GGMLQuantizationType[tensor.type]
    if tensor.type in ("F32", "F16"):
        dtype = np.dtype(np.float32 if tensor.type == "F32" else np.float16)
        size_bytes = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size_bytes, kind)
        return
    stored = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)


def _stored(gguf: Any, tensor: FileTensor) -> np.ndarray:
    """The tensor as the file holds it, float32, float16 or bytes of blocks."""
    values = np.ascontiguousarray(tensor.values().detach().to("cpu", torch.float32).numpy())
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _MAX_FLOAT16:  # NaN, too
        raise ExportError(
            f"expected finite weights up to {_MAX_FLOAT16:g} (float16) in {tensor.name}, found {largest:g}; "
            "check the checkpoint"
        )
    stored: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.type])
    return stored
