"""A causal language model without its head as an encoder of texts: one call, no cache, hidden states as the answer.

Inputs and outputs are those of other text encoders::

    input_ids, attention_mask     int64 [batch, sequence]
    last_hidden_state             float32 [batch, sequence, hidden], 0 at padding
    sentence_embedding            float32 [batch, size], if asked for
    logits                        float32 [batch, outputs], of a classifier alone

Rows may be padded on either side. The fused attention wants padding behind the text, so its graph turns ids to there
and hidden states back, which costs two lookups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto
from torch import nn

from exporters.decoder import DecoderExportSettings, check_settings, write_model
from exporters.decoder_checks import check_parts
from exporters.decoder_fused import FusedGraph
from exporters.decoder_graph import DecoderGraph, scalar
from exporters.decoder_parts import DecoderParts, LinearPart
from exporters.decoder_portable import PortableGraph
from exporters.encoder import ExportError, ExportSettings
from exporters.graph import GraphWriter, WeightStream
from exporters.heads import Pooling

_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize
_ELEMENTWISE = {
    "Tanh": "Tanh",
    "Sigmoid": "Sigmoid",
    "ReLU": "Relu",
    "LeakyReLU": "LeakyRelu",  # torch and ONNX have the same defaults
    "ELU": "Elu",
}


@dataclass(frozen=True)
class EmbeddingHead:
    """What makes one vector of a text: pooling, Dense layers with their activations, normalization.

    ``dense``: linears and activations of :class:`torch.nn`, in order.
    """

    pooling: Pooling
    normalize: bool
    dense: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class ScoreHead:
    """What makes scores ``[outputs]`` of a text: a linear over the hidden state of its last token."""

    linear: LinearPart  # [outputs, hidden]


def export_causal_encoder(
    parts: DecoderParts,
    head: EmbeddingHead | ScoreHead | None,
    output_names: Sequence[str],
    path: Path,
    settings: ExportSettings,
    *,
    form: Literal["onnxruntime", "portable"],
    max_length: int,
) -> None:
    """Write the model to ``path``, and weights beyond 2 GB beside it; both appear whole or not at all.

    Args:
        parts: the head over the vocabulary is not read.
        output_names: ``last_hidden_state`` and, with an :class:`EmbeddingHead`, ``sentence_embedding``; with a
            :class:`ScoreHead` ``logits`` alone.
        form: ``onnxruntime`` has fused attention; ``portable`` has standard operators only.
        max_length: tokens of the longest text; fixes the tables of positions.

    Raises:
        ExportError: parts that do not fit together, learned positions, or settings that the form does not allow.
        OSError: a file cannot be written.
    """
    limits = DecoderExportSettings(max_length, form, settings.opset)
    check_settings(parts, limits)
    check_parts(parts, max_length)
    known = _outputs(head)
    if parts.positions is not None or not output_names or not known.issuperset(output_names):
        found = "learned positions" if parts.positions is not None else ", ".join(output_names) or "no outputs"
        raise ExportError(
            f"expected rotary positions and outputs among {', '.join(sorted(known))}, found {found}; choose another "
            "model or correct output_names"
        )

    def model(outside: WeightStream | None) -> onnx.ModelProto:
        writer = GraphWriter(settings.opset, outside)
        kind = FusedGraph if form == "onnxruntime" else PortableGraph
        graph = kind(parts, writer, max_length, keeps_cache=False)
        encoder = _FusedEncoder(graph) if isinstance(graph, FusedGraph) else _Encoder(graph)
        encoder.write(head, output_names, settings)
        return writer.model({"onnxruntime": f">={graph.oldest_engine}"})

    write_model(model, parts, path, limits.max_file_bytes)


def _outputs(head: EmbeddingHead | ScoreHead | None) -> set[str]:
    """Outputs that a file with this head can have."""
    if isinstance(head, ScoreHead):
        return {"logits"}
    return {"last_hidden_state", *(["sentence_embedding"] if head else [])}


class _Encoder:
    """Inputs, outputs and embedding around the layers of a portable graph."""

    def __init__(self, graph: DecoderGraph) -> None:
        self.graph, self.writer = graph, graph.writer

    def write(
        self, head: EmbeddingHead | ScoreHead | None, output_names: Sequence[str], settings: ExportSettings
    ) -> None:
        """Add the whole model."""
        static = settings.shapes == "static"
        self.axes = [settings.batch_size, settings.seq_len] if static else ["batch_size", "sequence_length"]
        for name in ("input_ids", "attention_mask"):
            self.writer.input(name, self.axes)
        self.prepare()
        self.graph.run_layers()
        if isinstance(head, ScoreHead):
            self._score(head.linear)
            return
        states = self.graph.norm_of_stream(self.graph.parts.final_norm, "/final_norm")
        wants_all = "last_hidden_state" in output_names or head is None or head.pooling != "lasttoken"
        hidden = self._without_padding(states, "last_hidden_state" in output_names) if wants_all else ""
        size = self._embed(states, hidden, head) if head is not None and "sentence_embedding" in output_names else 0
        shapes = {
            "last_hidden_state": [*self.axes, self.graph.parts.embedding.shape[1]],
            "sentence_embedding": [self.axes[0], size],
        }
        for name in output_names:
            self.writer.output(name, shapes[name])

    def _score(self, linear: LinearPart) -> None:
        """Add the scores of each row's last token."""
        scores = self.graph.linear(self.graph.last_states(), linear, "/score")
        self.writer.node("Identity", [scores], "/scored/Identity", outputs=["logits"])
        self.writer.output("logits", [self.axes[0], len(linear.weight)])

    def prepare(self) -> None:
        """Add what the layers read of the inputs."""
        # Tokens before a token are those that count: padding on the left must not move positions.
        counted = self._node("CumSum", ["attention_mask", self.writer.constant(1)], "/positions/CumSum")
        places = self._node("Sub", [counted, self.writer.constant(1)], "/positions/Sub")
        self.graph.given_positions = self._node("Max", [places, self.writer.constant(0)], "/positions/Max")

    def in_place(self, states: str) -> str:
        """States ``[batch, sequence, hidden]`` of the graph where the inputs have their tokens."""
        return states

    @cached_property
    def _real(self) -> str:
        """True where there is no padding, ``[batch, sequence, 1]``."""
        real = self._node("Cast", ["attention_mask"], "/padding/Cast", to=TensorProto.BOOL)
        return self._node("Unsqueeze", [real, self.writer.constant([-1])], "/padding/Unsqueeze")

    def _without_padding(self, states: str, is_output: bool) -> str:
        """States with 0 at padding, which means nothing and may be anything."""
        named = ["last_hidden_state"] if is_output else []
        inputs = [self._real, self.in_place(states), scalar(self.writer, 0.0)]
        return self.writer.node("Where", inputs, "/padding/Where", outputs=named)

    def _embed(self, states: str, hidden: str, head: EmbeddingHead) -> int:
        """Add the embedding; returns its size."""
        vector, size = self._pooled(states, hidden, head.pooling), self.graph.parts.embedding.shape[1]
        for place, module in enumerate(head.dense):
            vector = self._dense(vector, module, f"/dense/{place}")
            size = module.out_features if isinstance(module, nn.Linear) else size
        if head.normalize:
            squares = self._node("Mul", [vector, vector], "/normalize/Mul")
            total = self._node("ReduceSum", [squares, self.writer.constant([1])], "/normalize/ReduceSum", keepdims=1)
            norm = self._node("Sqrt", [total], "/normalize/Sqrt")
            norm = self._node("Max", [norm, scalar(self.writer, _SMALLEST_NORM)], "/normalize/Max")
            self.writer.node("Div", [vector, norm], "/normalize/Div", outputs=["sentence_embedding"])
        else:
            self.writer.node("Identity", [vector], "/embedded/Identity", outputs=["sentence_embedding"])
        return size

    def _pooled(self, states: str, hidden: str, pooling: Pooling) -> str:
        """One vector a row, ``[batch, hidden]``, as :func:`exporters.heads.pool` makes it."""
        if pooling == "lasttoken":
            return self._node("GatherND", [states, self.graph.last_index], "/pooling/GatherND", batch_dims=1)
        if pooling == "cls":
            return self._node("Gather", [hidden, self.writer.constant(0)], "/pooling/Gather", axis=1)
        if pooling == "mean":
            summed = self._node("ReduceSum", [hidden, self.writer.constant([1])], "/pooling/ReduceSum", keepdims=0)
            inputs = ["attention_mask", self.writer.constant([1])]
            count = self._node("ReduceSum", inputs, "/pooling/count", keepdims=1)
            count = self._node("Cast", [count], "/pooling/Cast", to=TensorProto.FLOAT)
            count = self._node("Max", [count, scalar(self.writer, 1e-9)], "/pooling/Max")
            return self._node("Div", [summed, count], "/pooling/Div")
        lowest = scalar(self.writer, float(np.finfo(np.float32).min))
        filled = self._node("Where", [self._real, hidden, lowest], "/pooling/Where")
        if self.writer.opset < 18:
            return self._node("ReduceMax", [filled], "/pooling/ReduceMax", axes=[1], keepdims=0)
        return self._node("ReduceMax", [filled, self.writer.constant([1])], "/pooling/ReduceMax", keepdims=0)

    def _dense(self, x: str, module: nn.Module, path: str) -> str:
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach()
            return self.graph.linear(x, LinearPart(module.weight.detach(), bias), path)
        kind = type(module).__name__
        if kind in ("GELU", "SiLU"):
            return self.graph.activation("gelu" if kind == "GELU" else "silu", x, path)
        if kind not in _ELEMENTWISE:
            raise ExportError(
                f"expected activations of Dense layers among {', '.join([*_ELEMENTWISE, 'GELU', 'SiLU'])}, found "
                f"{kind}; choose another model"
            )
        return self._node(_ELEMENTWISE[kind], [x], f"{path}/{_ELEMENTWISE[kind]}")

    def _node(self, op: str, inputs: Sequence[str], name: str, **fields: Any) -> str:
        return self.writer.node(op, inputs, name, **fields)


class _FusedEncoder(_Encoder):
    """What stands around the layers of a fused graph, which want each row's text to begin at its first place."""

    def prepare(self) -> None:
        real = self._node("Cast", ["attention_mask"], "/turn/Cast", to=TensorProto.INT32)
        self._shift = self._node(
            "ArgMax", [real], "/turn/ArgMax", axis=1, keepdims=1
        )  # padding on the left, [batch, 1]
        steps = [self.writer.constant(0), self.graph.sequence, self.writer.constant(1)]
        self._places = self._node("Range", steps, "/turn/Range")  # [sequence]
        there = self._turned("Add", "/turn/there")
        self.graph.ids = self._node("GatherElements", ["input_ids", there], "/turn/GatherElements", axis=1)

    def in_place(self, states: str) -> str:
        back = self._node(
            "Unsqueeze", [self._turned("Sub", "/turn/back"), self.writer.constant([-1])], "/turn/Unsqueeze"
        )
        return self._node("GatherND", [states, back], "/turn/GatherND", batch_dims=1)

    def _turned(self, op: str, path: str) -> str:
        """Places ``[batch, sequence]`` moved around the row by its padding on the left."""
        moved = self._node(op, [self._places, self._shift], f"{path}/{op}")
        return self._node("Mod", [moved, self.graph.sequence], f"{path}/Mod")
