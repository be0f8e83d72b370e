"""What onnxruntime-genai wants beside a causal language model: ``genai_config.json``, read off the ONNX file itself.

onnxruntime-genai from 0.18 on makes each layer's cache as the inputs of the graph say, so that heads may differ by
layer and layers without attention have no cache; older releases make all caches alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from exporters.encoder import ExportError
from exporters.files import atomic_path

CONFIG_NAME = "genai_config.json"
_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that begin, end and pad a text. Without a padding token, the first that ends a text pads."""

    end: Sequence[int]
    begin: int | None = None
    pad: int | None = None


def write_genai_config(model_path: Path, tokens: SpecialTokens) -> Path:
    """Write ``genai_config.json`` beside a file of :func:`exporters.decoder.export_decoder`; returns its path.

    A file whose inputs do not say the heads of layers that differ (``stock_optimum``) gets a second graph beside,
    ``NAME.genai.onnx``, whose inputs do and which reads the same weights.

    Raises:
        ExportError: a file of the portable form or of no attention, no token that ends a text, or weights inside a
            file that would have to be written twice.
    """
    model = onnx.load(str(model_path), load_external_data=False)
    caches = {item.name: _dims(item) for item in model.graph.output if item.name.startswith("present.")}
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions:
        raise ExportError(
            f"expected {model_path} in the form onnxruntime with attention in a layer, found no GroupQueryAttention; "
            "export it in that form"
        )
    if not tokens.end:
        raise ExportError("expected at least one token that ends a text, found none; name it in SpecialTokens.end")
    graph_path = model_path
    if _needs_fixed_inputs(model, caches):
        graph_path = model_path.with_name(f"{model_path.stem}.genai.onnx")
        _write_fixed_inputs(model, caches, graph_path, model_path)
    query_heads = max(
        attribute.i for node in attentions for attribute in node.attribute if attribute.name == "num_heads"
    )
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph_path.name,
        "head_size": max(shape[3] for shape in caches.values()),
        "hidden_size": _embedding_width(model),
        "num_attention_heads": query_heads,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in caches),
        "num_key_value_heads": max(shape[1] for shape in caches.values()),
        "inputs": _INPUTS,
        "outputs": _OUTPUTS,
    }
    config_path = model_path.with_name(CONFIG_NAME)
    with atomic_path(config_path) as temporary:
        temporary.write_text(json.dumps(_config(model, decoder, tokens), indent=2) + "\n", encoding="utf-8")
    return config_path


def _config(model: onnx.ModelProto, decoder: dict[str, Any], tokens: SpecialTokens) -> dict[str, Any]:
    metadata = {item.key: item.value for item in model.metadata_props}
    vocabulary = next(_dims(item)[2] for item in model.graph.output if item.name == "logits")
    ids = {
        "bos_token_id": tokens.end[0] if tokens.begin is None else tokens.begin,
        "eos_token_id": list(tokens.end),
        "pad_token_id": tokens.end[0] if tokens.pad is None else tokens.pad,
    }
    max_length = int(metadata["max_length"])
    return {
        "model": {
            "type": "decoder",
            "context_length": max_length,
            "vocab_size": vocabulary,
            **ids,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": max_length, "past_present_share_buffer": True},
    }


def _needs_fixed_inputs(model: onnx.ModelProto, caches: dict[str, tuple[int, ...]]) -> bool:
    """True where inputs leave heads open and layers differ, so that the config cannot say them either."""
    free = any(
        not shape[1]
        for shape in (_dims(item) for item in model.graph.input if item.name.startswith("past_key_values."))
    )
    return free and len({shape[1::2] for shape in caches.values()}) > 1


def _write_fixed_inputs(
    model: onnx.ModelProto, caches: dict[str, tuple[int, ...]], path: Path, model_path: Path
) -> None:
    if not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ExportError(
            f"expected the weights of {model_path} in a file beside, to be shared by two graphs, found them inside; "
            "export it with max_file_bytes = 0, or without stock_optimum"
        )
    for item in model.graph.input:
        shape = caches.get(item.name.replace("past_key_values.", "present.", 1))
        if shape is not None:
            item.type.tensor_type.shape.dim[1].dim_value = shape[1]
            item.type.tensor_type.shape.dim[3].dim_value = shape[3]
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _embedding_width(model: onnx.ModelProto) -> int:
    return next(int(tensor.dims[1]) for tensor in model.graph.initializer if tensor.name == "embedding.weight")


def _dims(item: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Sizes of axes, 0 for free ones."""
    return tuple(int(dim.dim_value) for dim in item.type.tensor_type.shape.dim)
