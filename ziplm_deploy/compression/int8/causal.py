"""Linears of causal language models as their files have them: some are several of the model's, and the head is one.

A file computes queries, keys and values in one product where it can. Its head reads the embedding where both are one
matrix; in integers it has a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

from exporters.names import HEAD
from ziplm_deploy.compression.onnx_graphs import drop_unread
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import layers_of


def linear_groups(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Module paths of the linears that each linear of a file stands for, by its name there.

    Args:
        names: linears of the model's file, as :func:`ziplm_deploy.compression.int8.quantize.linear_names` gives them.
    """
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    if architecture.causal is None:
        return {name: (name,) for name in names}
    layers = layers_of(model)
    modules = dict(model.named_modules())
    prefix = next(name for name, module in modules.items() if module is layers)
    in_block = {
        "attention.query": (architecture.attention, architecture.query),
        "attention.key": (architecture.attention, architecture.key),
        "attention.value": (architecture.attention, architecture.value),
        "attention.output": (architecture.attention_output,),
        "feed_forward.up": (architecture.ffn, architecture.ffn_input),
        "feed_forward.gate": (architecture.ffn, architecture.ffn_gate or ""),
        "feed_forward.down": (architecture.ffn_output,),
    }
    paths: dict[str, tuple[str, ...]] = {name: (".".join(filter(None, path)),) for name, path in in_block.items()}
    separate = (name for part in ("query", "key", "value") for name in paths[f"attention.{part}"])
    paths["attention.qkv"] = tuple(dict.fromkeys(separate))
    if architecture.fused is not None:  # one linear of the model, whatever the file does
        fused = paths["attention.query"]
        paths |= dict.fromkeys(("attention.qkv", "attention.query", "attention.key", "attention.value"), fused)
    output = model.get_output_embeddings()  # type: ignore[operator]
    head = next((name for name, module in modules.items() if module is output), "")  # encoders have none
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name == HEAD:
            groups[name] = (head,)
            continue
        _, index, part = name.split(".", 2)
        groups[name] = tuple(f"{prefix}.{index}.{path}" for path in paths[part])
    return groups


def keep_tied_head(model: onnx.ModelProto, head: onnx.NodeProto) -> None:
    """Undo, in place, what ONNX Runtime's quantizer does to every Gemm, quantized or not: a head that stays in float32
    would have a second matrix beside the embedding. ``head`` is the Gemm as it was; tied heads have no bias."""
    graph = model.graph
    if head.input[1] not in {item.name for item in graph.initializer} or len(head.input) > 2:
        return
    node = next(each for each in graph.node if head.output[0] in each.output)
    node.CopyFrom(head)
    drop_unread(graph)


def head_as_product(model: onnx.ModelProto, head: onnx.NodeProto) -> onnx.NodeProto:
    """Give the head a matrix ``[hidden, vocabulary]`` of its own, in place; returns the product with it.

    ``head`` is the Gemm that :mod:`exporters.decoder_graph` writes, with the transpose of ``[vocabulary, hidden]``.
    """
    graph = model.graph
    weight = next(item for item in graph.initializer if item.name == head.input[1])
    transposed = np.ascontiguousarray(numpy_helper.to_array(weight).T)
    graph.initializer.append(numpy_helper.from_array(transposed, f"{HEAD}.product"))
    rows, logits, bias = head.input[0], head.output[0], list(head.input[2:])
    place = next(index for index, node in enumerate(graph.node) if node.name == head.name)
    output = f"{logits}_product" if bias else logits
    product = helper.make_node("MatMul", [rows, f"{HEAD}.product"], [output], name=f"/{HEAD}/MatMul")
    graph.node[place].CopyFrom(product)
    if bias:
        graph.node.insert(place + 1, helper.make_node("Add", [output, *bias], [logits], name=f"/{HEAD}/Add"))
    return product
