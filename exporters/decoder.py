"""A causal language model as an ONNX file with a cache of keys and values, whose head count may differ by layer.

Inputs and outputs are those that stock optimum and onnxruntime-genai feed and read::

    input_ids, attention_mask     int64 [batch, sequence], [batch, total]
    position_ids                  int64 [batch, sequence], in the portable form only
    past_key_values.N.key, .value float32 [batch, kv heads, past, head_dim], for layers with attention
    logits                        float32 [batch, 1, vocabulary] of each row's last token, or of all tokens
    present.N.key, .value         float32, the cache for the next call
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from exporters.decoder_checks import check_parts, weights_bytes
from exporters.decoder_fused import HEAD_DIM_STEP, FusedGraph
from exporters.decoder_parts import AttentionPart, DecoderParts
from exporters.decoder_portable import PortableGraph
from exporters.encoder import ExportError
from exporters.files import atomic_pair, atomic_path, weights_beside
from exporters.graph import GraphWriter, WeightStream

OLDEST_OPSET = 17  # the first with LayerNormalization
# Operators of ONNX Runtime, though it lists this one under the standard's name.
_CONTRIB_OF_STANDARD_NAME = "SimplifiedLayerNormalization"


@dataclass(frozen=True)
class DecoderExportSettings:
    """Form and limits of the file.

    Attributes:
        form: ``onnxruntime`` fuses a layer's attention, turns and cache into one contrib operator, which is the fastest
            on CPUs and can keep the cache in place (bind one buffer as past and present); rows are padded on the right.
            ``portable`` has standard operators only; rows are padded on either side.
        opset: version of the standard operators, from 17 on.
        max_length: tokens of the longest text, prompt and answer; fixes the tables of positions.
        all_logits: logits of all tokens, for perplexity, not of each row's last one.
        stock_optimum: cache inputs take an empty cache of any head count and width, which is what stock
            ``ORTModelForCausalLM`` starts every layer with. Costs microseconds a layer and keeps caches in place. But
            the inputs no longer say each layer's heads (the outputs do), so onnxruntime-genai, which reads them there,
            loads such a file of layers that differ only through :func:`exporters.genai.write_genai_config`.
        max_file_bytes: weights above go to a file ``NAME.data`` beside; one ONNX file holds less than 2 GB.
    """

    max_length: int
    form: Literal["onnxruntime", "portable"] = "onnxruntime"
    opset: int = 17
    all_logits: bool = False
    stock_optimum: bool = False
    max_file_bytes: int = 2**31 - 2**25


def export_decoder(parts: DecoderParts, path: Path, settings: DecoderExportSettings) -> None:
    """Write the model to ``path``, and large weights beside it; both appear whole or not at all.

    The model's metadata say form, opset, ``max_length``, which contrib operators an engine needs, and from which
    release on ONNX Runtime computes them right. Products of weights are named so that
    :func:`exporters.names.linear_of` finds the linear; queries, keys and values are one ``attention.qkv`` where one
    product computes them.

    Raises:
        ExportError: parts that do not fit together, or settings that the model or the form does not allow.
        OSError: a file cannot be written.
    """
    check_settings(parts, settings)
    check_parts(parts, settings.max_length)
    write_model(lambda outside: _model(parts, settings, outside), parts, path, settings.max_file_bytes)


def write_model(
    model: Callable[[WeightStream | None], onnx.ModelProto], parts: DecoderParts, path: Path, max_file_bytes: int
) -> None:
    """Write what ``model`` makes to ``path``, and weights beside it if all together exceed ``max_file_bytes``.

    ``model`` is called once, with the open file for large weights, if there is to be one.

    Raises:
        OSError: a file cannot be written.
    """
    beside = weights_beside(path)
    if weights_bytes(parts) <= max_file_bytes:
        with atomic_path(path) as temporary:
            temporary.write_bytes(model(None).SerializeToString())
        beside.unlink(missing_ok=True)  # of an earlier export that nothing refers to any more
        return
    with atomic_pair(path, beside) as (temporary, temporary_beside), temporary_beside.open("wb") as stream:
        temporary.write_bytes(model(WeightStream(stream, beside.name)).SerializeToString())


def _model(parts: DecoderParts, settings: DecoderExportSettings, outside: WeightStream | None) -> onnx.ModelProto:
    writer = GraphWriter(settings.opset, outside)
    kind = FusedGraph if settings.form == "onnxruntime" else PortableGraph
    graph = kind(parts, writer, settings.max_length, any_empty_cache=settings.stock_optimum)
    graph.write(settings.all_logits)
    contrib = {op for domain, op in writer.operators() if domain or op == _CONTRIB_OF_STANDARD_NAME}
    return writer.model(
        {
            "form": settings.form,
            "opset": str(settings.opset),
            "max_length": str(settings.max_length),
            "contrib_ops": ", ".join(sorted(contrib)),
            "onnxruntime": f">={graph.oldest_engine}",
        }
    )


def check_settings(parts: DecoderParts, settings: DecoderExportSettings) -> None:
    """Raise :class:`ExportError` for an opset or a form that cannot hold the model."""
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= settings.opset <= newest:
        raise ExportError(
            f"expected an opset from {OLDEST_OPSET} to {newest}, found {settings.opset}; choose one of those"
        )
    if settings.form not in ("onnxruntime", "portable"):
        raise ExportError(f"expected form onnxruntime or portable, found {settings.form}; correct it")
    if settings.form == "portable":
        return
    for index, layer in enumerate(parts.layers):
        attention = layer.attention
        if isinstance(attention, AttentionPart) and attention.head_dim % HEAD_DIM_STEP:
            raise ExportError(
                f"expected head_dim in multiples of {HEAD_DIM_STEP} for GroupQueryAttention, found "
                f"{attention.head_dim} in layers[{index}]; choose form portable"
            )
