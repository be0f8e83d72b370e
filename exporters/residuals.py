"""Residual additions that ONNX Runtime leaves alone.

Where it knows the shapes (static exports, and INT8 files, whose quantizer infers them) it merges Add and
LayerNormalization to SkipLayerNormalization, and that CPU kernel takes several times as long as the two: pruned INT8
models got half as fast again without it. ``Sum`` of two tensors computes the same, is no part of that pattern, and runs
as fast as ``Add`` on every engine here; so no session needs an option to be fast.
"""

from __future__ import annotations

from collections import defaultdict

import onnx

# What an Add in front of a layer normalization is read by: since opset 17, and before as torch spells it out.
_NORMALIZATION = ({"LayerNormalization"}, {"ReduceMean", "Sub"})


def residuals_as_sums(model: onnx.ModelProto) -> int:
    """Turn every Add of two computed tensors that a layer normalization reads into a Sum; returns how many."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    residuals = [
        node
        for node in graph.node
        if node.op_type == "Add"
        and constants.isdisjoint(node.input)
        and any(pattern <= readers[node.output[0]] for pattern in _NORMALIZATION)
    ]
    for node in residuals:
        node.op_type = "Sum"
    return len(residuals)
