"""Products of weights alone, computed once: an exported file holds what they give.

Such are the keys and queries of distances that DeBERTa's layers project from their position embeddings. Engines would
compute them when a file is opened or, worse, at every call; INT8 files would hold the projections' weights twice, in
integers for tokens and in float32 for positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

_PRODUCTS = ("Gemm", "MatMul")


def fold_products(model: onnx.ModelProto) -> int:
    """Replace, in place, what a graph computes from products of constants by its values; returns how many tensors."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    products: set[str] = set()  # constants that a product of constants goes into
    inner: list[onnx.NodeProto] = []
    read = {item.name for item in graph.output}  # by what depends on inputs
    for node in graph.node:
        names = {name for name in node.input if name}
        if not names <= constants:
            read |= names
            continue
        inner.append(node)
        constants.update(node.output)
        if node.op_type in _PRODUCTS or not products.isdisjoint(names):
            products.update(node.output)
    wanted = [name for node in inner for name in node.output if name in products & read]
    if wanted:
        values = _values(model, _needed(inner, set(wanted)), wanted)
        _drop_nodes(graph, lambda node: not products.isdisjoint(node.output))
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
        _drop_unread(graph)
    return len(wanted)


def _values(model: onnx.ModelProto, nodes: list[onnx.NodeProto], names: list[str]) -> dict[str, np.ndarray]:
    """Tensors that nodes compute from initializers."""
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    part = helper.make_model(
        helper.make_graph(nodes, "constants", [], outputs, tensors),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {}), strict=True))


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Nodes of a list, in their order, that the wanted tensors depend on."""
    found = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            found.append(node)
            wanted |= set(node.input)
    return found[::-1]


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop nodes and initializers that no output depends on."""
    needed = _needed(graph.node, {item.name for item in graph.output})
    made = {name for node in needed for name in node.output}
    read = {name for node in needed for name in node.input}
    _drop_nodes(graph, lambda node: made.isdisjoint(node.output))
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def _drop_nodes(graph: onnx.GraphProto, chosen: Callable[[onnx.NodeProto], bool]) -> None:
    for index in reversed(range(len(graph.node))):
        if chosen(graph.node[index]):
            del graph.node[index]
