"""Reading and rewriting the graphs of ONNX files, in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ziplm_deploy.errors import CorruptArtifactError


def load_onnx(path: Path) -> onnx.ModelProto:
    """An exported model in which every reader of a constant names it directly.

    Raises:
        CorruptArtifactError: no ONNX file, or one without nodes.
    """
    try:
        model = onnx.load(str(path))
    except (OSError, DecodeError) as error:
        raise CorruptArtifactError(f"expected an ONNX file at {path}, found: {error}; export it again") from error
    if not model.graph.node:
        raise CorruptArtifactError(f"expected an ONNX file at {path}, found a graph without nodes; export it again")
    _inline_aliases(model.graph)
    return model


def _inline_aliases(graph: onnx.GraphProto) -> None:
    """Let readers of ``Identity(constant)`` read the constant: so the exporter stores equal weights once."""
    constants = {item.name for item in graph.initializer}
    outputs = {output.name for output in graph.output}
    aliases: dict[str, str] = {}
    for node in list(graph.node):
        for place, name in enumerate(node.input):
            node.input[place] = aliases.get(name, name)
        if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs:
            aliases[node.output[0]] = node.input[0]
            graph.node.remove(node)


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Set the nodes and drop initializers that none of them reads."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # `nodes` live in the graph
    del graph.node[:]
    graph.node.extend(copies)
    drop_unread(graph)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Drop initializers that no node reads."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]
