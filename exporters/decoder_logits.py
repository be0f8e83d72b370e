"""A causal language model's file that answers for all tokens of a call, made of one that answers for the last.

Perplexity of a file is that of the file itself, whatever was done to its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.encoder import ExportError

_EMBEDDINGS = ("embedding.weight", "embedding.weight_int8")  # as exported; rounded
_LAST, _END = "/last/", "/head/Unsqueeze"  # nodes that exporters.decoder_graph selects each row's last token with


def with_all_logits(path: Path) -> onnx.ModelProto:
    """Graph of a file that :func:`exporters.export_decoder` wrote, with ``logits`` ``[batch, sequence, vocabulary]``.

    Weights in a file beside stay there, so that the graph must be written into the same folder to be run.

    Raises:
        ExportError: the file is of another exporter.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    gathered = {node.name: node for node in graph.node if node.name.startswith(_LAST) and node.op_type == "GatherND"}
    end = next((node for node in graph.node if node.name == _END), None)
    embedding = next((tensor for tensor in graph.initializer if tensor.name in _EMBEDDINGS), None)
    if not gathered or end is None or embedding is None:
        raise ExportError(
            f"expected a causal language model that answers for each row's last token in {path}, found another graph; "
            "export it again"
        )
    vocabulary = graph.output[0].type.tensor_type.shape.dim[2]
    _constant(graph, "all_logits_rows", [-1, embedding.dims[1]])
    _constant(graph, "all_logits_vocabulary", [vocabulary.dim_value])
    for node in gathered.values():  # [batch, sequence, hidden] -> [batch * sequence, hidden]
        node.CopyFrom(helper.make_node("Reshape", [node.input[0], "all_logits_rows"], node.output, name=node.name))
    scores = end.input[0]
    shape = helper.make_node("Shape", ["input_ids"], ["all_logits_calls"], name="/all/Shape")
    whole = helper.make_node(
        "Concat", ["all_logits_calls", "all_logits_vocabulary"], ["all_logits_shape"], name="/all/Concat", axis=0
    )
    end.CopyFrom(helper.make_node("Reshape", [scores, "all_logits_shape"], ["logits"], name=_END))
    graph.node.insert(0, whole)
    graph.node.insert(0, shape)
    graph.output[0].type.tensor_type.shape.dim[1].Clear()
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "sequence"
    return model


def _constant(graph: onnx.GraphProto, name: str, values: list[int]) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
