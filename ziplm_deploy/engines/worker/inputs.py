"""Inputs for timing, made from the names, types and shapes that a model declares."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

INPUT_SEED = 0
ID_RANGE = (4, 24)
IMAGE_SIZE = {"channel": 3, "height": 224, "width": 224}
NUMPY_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
}


def make_ids(batch_size: int, tokens: int) -> np.ndarray:
    """Token ids ``[batch_size, tokens]`` for timing, in a small range that every vocabulary has."""
    return np.random.default_rng(INPUT_SEED).integers(*ID_RANGE, (batch_size, tokens))


def make_inputs(metadata: list[Any], batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """Inputs for timing: ids in a small range that every vocabulary has, full masks, normal floats.

    Raises ValueError where a fixed axis of the model contradicts ``batch_size`` or ``seq_len``.
    """
    generator = np.random.default_rng(INPUT_SEED)
    return {entry.name: _make_input(entry, batch_size, seq_len, generator) for entry in metadata}


def _make_input(entry: Any, batch_size: int, seq_len: int, generator: np.random.Generator) -> np.ndarray:
    if entry.type not in NUMPY_TYPES:
        raise ValueError(f"input {entry.name!r} has type {entry.type}; known are {', '.join(NUMPY_TYPES)}")
    dtype = NUMPY_TYPES[entry.type]
    is_float = np.issubdtype(dtype, np.floating)
    shape = [_axis(entry, axis, batch_size, seq_len, is_float) for axis in range(len(entry.shape))]
    name = entry.name.lower()
    if "mask" in name or dtype is np.bool_:  # also as floats: random ones would mask at random
        return np.ones(shape, dtype)
    if is_float:
        return generator.standard_normal(shape).astype(dtype)
    if "type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1, dtype=dtype), shape).copy()
    return generator.integers(*ID_RANGE, shape).astype(dtype)


def _axis(entry: Any, axis: int, batch_size: int, seq_len: int, is_float: bool) -> int:
    size, rank = entry.shape[axis], len(entry.shape)
    wanted = batch_size if axis == 0 else seq_len if axis == 1 and rank == 2 else None
    if isinstance(size, int) and size > 0:
        if wanted is not None and size != wanted and not (is_float and axis == 1):
            raise ValueError(
                f"input {entry.name!r} has the fixed shape {entry.shape}, but batch size {batch_size} and {seq_len} "
                "tokens were asked for; ask for those of the file, or export it for these"
            )
        return size
    if wanted is not None:
        return wanted
    for part, default in IMAGE_SIZE.items():
        if isinstance(size, str) and part in size.lower():
            return default
    return {1: 3, 2: 224, 3: 224}[axis] if rank == 4 and is_float else seq_len


def is_fixed(shape: list[Any]) -> bool:
    """Whether no axis is symbolic."""
    return all(isinstance(axis, int) and axis > 0 for axis in shape)


def onnx_entry(value: Any) -> argparse.Namespace:
    """Name, type and shape of a graph input or output, as ONNX Runtime calls them."""
    kinds = {1: "tensor(float)", 6: "tensor(int32)", 7: "tensor(int64)", 9: "tensor(bool)", 11: "tensor(double)"}
    tensor = value.type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in tensor.shape.dim]
    return argparse.Namespace(name=value.name, type=kinds.get(tensor.elem_type, str(tensor.elem_type)), shape=shape)
