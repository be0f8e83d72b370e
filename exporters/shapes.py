"""Shapes that a traced graph computes at every call, as the constants that they are.

torch traces the size of a tensor as Shape and Gather, even where only batch and length are free: many nodes of a layer
with rotary positions compute where a head's halves begin. They are cheap, but so are the other nodes of a model
that was pruned by much. Graphs without rotary positions stay as torch writes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

_INTEGER_OPS = {"Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Slice", "Squeeze", "Sub", "Unsqueeze"}
_SMALL = 16  # numbers of a tensor that may be part of a shape

_TRIALS = ((7, 23), (11, 29))  # batch and length; no size of a model is both of a pair
Dims = list[int | tuple[int, int] | None]


def fold_shapes(model: onnx.ModelProto) -> int:
    """Replace what does not depend on the inputs in the shapes of a graph that rotates, in place.

    Returns:
        How many nodes it took out of the graph; none of one with branches or loops, whose parts read names outside.
    """
    graph = model.graph
    has_subgraphs = any(field.HasField("g") for node in graph.node for field in node.attribute)
    if has_subgraphs or not any(node.op_type == "Cos" for node in graph.node):
        return 0
    before = len(graph.node)
    _constants_as_initializers(graph)
    while _fold_once(model):
        _drop_unread(graph)
    return before - len(graph.node)


def _fold_once(model: onnx.ModelProto) -> bool:
    """Replace what follows from the shapes that are known so far; False if there is nothing left."""
    graph = model.graph
    dims, known = _dims(model), _small_integers(graph)
    shaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape" and not node.attribute}
    done: set[str] = set()
    for node in graph.node:
        name = node.output[0]
        if node.op_type == "Gather" and node.input[0] in shaped and node.input[1] in known:
            value = _size(dims.get(shaped[node.input[0]]), known[node.input[1]])
        elif node.op_type in _INTEGER_OPS and node.input and all(each in known for each in node.input):
            results: Any = ReferenceEvaluator(node).run(None, {each: known[each] for each in node.input})
            value = results[0]
        else:
            value = None
        if value is not None and value.dtype == np.int64 and value.size <= _SMALL:
            known[name] = value
            done.add(name)
            graph.initializer.append(numpy_helper.from_array(value, name))
        elif node.op_type == "Reshape" and node.input[1] not in known:
            shape = _reshape(dims.get(node.input[0]), dims.get(name))
            if shape is not None:
                constant = f"{name}_shape"
                graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), constant))
                node.input[1] = constant
                done.add(constant)
    kept = [node for node in graph.node if node.output[0] not in done]
    del graph.node[:]
    graph.node.extend(kept)
    return bool(done)


def _size(dims: Dims | None, index: np.ndarray) -> np.ndarray | None:
    """Sizes at these places of a shape; None unless all of them are numbers."""
    if dims is None:
        return None
    sizes = [dims[place] for place in index.flatten().tolist()]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return np.array(sizes, dtype=np.int64).reshape(index.shape)


def _reshape(source: Dims | None, target: Dims | None) -> list[int] | None:
    """Constant that reshapes one to the other: 0 for a free size that stays where it is, -1 for one that follows."""
    if source is None or target is None:
        return None
    shape = [
        size if isinstance(size, int) else 0 if size is not None and source[place : place + 1] == [size] else -1
        for place, size in enumerate(target)
    ]
    return shape if shape.count(-1) <= 1 else None


def _dims(model: onnx.ModelProto) -> dict[str, Dims]:
    """Sizes of every tensor as far as they follow.

    From two inputs of other sizes: what is the same for both is constant, and where sizes of two tensors are the same
    pair of numbers, they are the same size. Names of free sizes get lost where tensors are broadcast to each other.
    """
    light = _without_weights(model)
    first, second = (_inferred(light, sizes) for sizes in _TRIALS)
    return {
        name: [
            a if a == b else None if a is None or b is None else (a, b) for a, b in zip(dims, second[name], strict=True)
        ]
        for name, dims in first.items()
        if len(second.get(name, ())) == len(dims)
    }


def _inferred(light: onnx.ModelProto, sizes: tuple[int, int]) -> dict[str, list[int | None]]:
    """Sizes of every tensor if the free first axis of inputs, and all their other free axes, have these sizes."""
    trial = onnx.ModelProto()
    trial.CopyFrom(light)
    for info in (*trial.graph.input, *trial.graph.output):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = sizes[min(axis, 1)]
    graph = onnx.shape_inference.infer_shapes(trial, data_prop=True).graph
    return {
        info.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.value_info, *graph.input)
        if info.type.tensor_type.HasField("shape")
    }


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with large tensors as inputs of their shape, of which inference needs no values."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _small_integers(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT64 and np.prod(tensor.dims) <= _SMALL
    }


def _constants_as_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = next((field.t for field in node.attribute if field.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            graph.initializer.append(value)
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Take out, from the end, nodes and small tensors that nobody reads."""
    read = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for place in reversed(range(len(graph.initializer))):  # one by one: to extend a list would copy all weights
        if graph.initializer[place].name not in read:
            del graph.initializer[place]
