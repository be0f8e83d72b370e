"""Word embeddings of an ONNX file as 8-bit integers: most of the size of a small model, hardly any of its time.

::

    ids ─ Gather(table, float32) ─ …                                    before
    ids ─ Gather(table, int8) ─ Cast(float) ─ Mul(scale[hidden]) ─ …    after

A scale for each column: some columns of BERT's embeddings are much larger than others, and one scale for all was four
times coarser. Tables with few rows (positions, token types) stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ziplm_deploy.artifacts import atomic_path
from ziplm_deploy.compression.onnx_graphs import load_onnx, replace_nodes, save_onnx
from ziplm_deploy.errors import NumericalError

MIN_ROWS, MIN_SAVED_BYTES = 4096, 1 << 20  # of a table that is worth two more nodes: a vocabulary, not positions
LIMIT = 127


def round_embeddings(model: onnx.ModelProto) -> None:
    """Store large embedding tables as int8 with a float32 scale for each column, in place.

    A table that anything but a lookup of rows reads, too, stays as it is.

    Raises:
        NumericalError: NaN or infinity in a table.
    """
    graph = model.graph
    tables = {item.name: item for item in graph.initializer if _is_large(item)}
    read_otherwise = {
        name for node in graph.node for place, name in enumerate(node.input) if place > 0 or not _looks_up_rows(node)
    }
    rounded = set(tables) - read_otherwise
    for name in sorted(rounded):
        graph.initializer.extend(_integers(name, tables[name]))
    nodes = (part for node in graph.node for part in (_lookup(node) if rounded.intersection(node.input) else [node]))
    replace_nodes(graph, list(nodes))


def round_embeddings_of(path: Path) -> None:
    """:func:`round_embeddings` of a file; whole or not at all.

    Raises:
        CorruptArtifactError: no ONNX file.  NumericalError: NaN or infinity in a table.
        StorageError: the file cannot be written.
    """
    model = load_onnx(path)
    round_embeddings(model)
    with atomic_path(path) as temporary:
        save_onnx(model, temporary)


def has_rounded_embeddings(path: Path) -> bool:
    """Whether a file looks up rows of 8-bit tables."""
    graph = load_onnx(path).graph
    integers = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    return any(_looks_up_rows(node) and node.input[0] in integers for node in graph.node)


def _is_large(item: onnx.TensorProto) -> bool:
    floats = item.data_type == onnx.TensorProto.FLOAT and len(item.dims) == 2
    return floats and item.dims[0] >= MIN_ROWS and 3 * item.dims[0] * item.dims[1] >= MIN_SAVED_BYTES


def _looks_up_rows(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and all(attribute.i == 0 for attribute in node.attribute)  # axis 0 is the default


def _integers(name: str, item: onnx.TensorProto) -> Iterator[onnx.TensorProto]:
    table = numpy_helper.to_array(item)  # [vocabulary, hidden]
    if not np.isfinite(table).all():
        raise NumericalError(f"expected finite embeddings in {name}, found NaN or infinity; check the checkpoint")
    scale = np.abs(table).max(axis=0) / np.float32(LIMIT)
    scale[scale == 0] = 1.0
    yield numpy_helper.from_array(np.round(table / scale).astype(np.int8), f"{name}_int8")
    yield numpy_helper.from_array(scale, f"{name}_scale")


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    table, ids = node.input
    name, output = node.name or node.output[0], node.output[0]
    integers, real = f"{output}_int8", f"{output}_unscaled"
    return [
        helper.make_node("Gather", [f"{table}_int8", ids], [integers], name=name),
        helper.make_node("Cast", [integers], [real], name=f"{name}_cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [real, f"{table}_scale"], [output], name=f"{name}_mul"),
    ]
