"""Reading and rewriting the graphs of ONNX files, in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ziplm_deploy.errors import CorruptArtifactError, UsageError

MOST_BYTES = 2.0e9  # of weights; protobuf holds 2 GiB


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


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with all its weights inside.

    Raises:
        UsageError: they are more than a file holds.
    """
    check_size(sum(len(item.raw_data) for item in model.graph.initializer))
    onnx.save(model, str(path))


def check_size(n_bytes: float) -> None:
    """Refuse a file with so many bytes of weights; raises :class:`UsageError` above :data:`MOST_BYTES`."""
    if n_bytes > MOST_BYTES:
        raise UsageError(
            f"expected INT8 files of up to {MOST_BYTES / 1e9:.1f} GB, found weights of {n_bytes / 1e9:.1f} GB, of "
            "which those in float32 take four bytes each; set compress.int8.embeddings: true or lower max_fp32_share, "
            "or leave INT8 out"
        )


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
