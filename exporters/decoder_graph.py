"""Layers of a causal language model as nodes: what both forms of its graph have in common.

Additions to the residual stream wait until somebody reads it: a norm that adds by itself takes them over, constants of
dropped blocks and biases before them are summed when the file is written, and a block that left nothing costs nothing.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from exporters.decoder_cache import CachedLayer, cached_layers
from exporters.decoder_parts import (
    Activation,
    AttentionPart,
    DecoderParts,
    DroppedPart,
    FeedForwardPart,
    LayerPart,
    LinearPart,
    NormPart,
)
from exporters.graph import GraphWriter

Projection = Literal["query", "key", "value"]
Block = AttentionPart | FeedForwardPart | DroppedPart


@dataclass
class ResidualStream:
    """Names of a computed sum and of what is still to be added to it, and the sum of constants to be added."""

    value: str
    pending: list[str] = field(default_factory=list)
    bias: Tensor | None = None

    def add(self, computed: str) -> None:
        self.pending.append(computed)

    def add_constant(self, bias: Tensor | None) -> None:
        """Add ``bias``, ``[hidden]``, or nothing."""
        if bias is not None:
            self.bias = bias.float() if self.bias is None else self.bias + bias.float()


class DecoderGraph(abc.ABC):
    """Writer of one model into one graph; subclasses choose the operators.

    Activations are ``[batch, sequence, ...]``; ``past`` tokens are those of earlier calls, ``total`` all of them.
    """

    ids = "input_ids"  # tokens that are looked up, [batch, sequence]
    given_positions = "position_ids"  # position of each token, in the form that does not count them itself

    def __init__(
        self,
        parts: DecoderParts,
        writer: GraphWriter,
        max_length: int,
        *,
        any_empty_cache: bool = False,
        keeps_cache: bool = True,
    ) -> None:
        self.parts = parts
        self.writer = writer
        self.max_length = max_length
        self.any_empty_cache = any_empty_cache
        self.keeps_cache = keeps_cache
        self.cached = {cached.layer: cached for cached in cached_layers(parts)}

    def write(self, all_logits: bool) -> None:
        """Add the whole model: logits of each row's last token, or of all tokens."""
        self.writer.input("input_ids", ["batch", "sequence"])
        self.writer.input("attention_mask", ["batch", "total"])
        self.declare_positions()
        vocabulary = len(self.parts.embedding)
        self.writer.output("logits", ["batch", "sequence" if all_logits else 1, vocabulary])
        self.run_layers()
        if all_logits:
            self._head_of_all(vocabulary)
        else:
            self._head_of_last()

    def run_layers(self) -> None:
        """Add embeddings and layers; what they give is in ``self.stream``."""
        self.stream = ResidualStream(self._embedded())
        for index, layer in enumerate(self.parts.layers):
            self._layer(index, layer)

    @property
    @abc.abstractmethod
    def oldest_engine(self) -> str:
        """Oldest release of ONNX Runtime that the file is right in."""

    @abc.abstractmethod
    def declare_positions(self) -> None:
        """Declare the input of positions, if the form has one."""

    @property
    @abc.abstractmethod
    def positions(self) -> str:
        """Position of each token, ``[batch, sequence]``."""

    @property
    @abc.abstractmethod
    def last_index(self) -> str:
        """Index of each row's last token among those of this call, ``[batch, 1]``."""

    @abc.abstractmethod
    def attend(self, x: str, part: AttentionPart, cached: CachedLayer, path: str) -> str:
        """Attention before its output projection, ``[batch, sequence, n_heads * head_dim]``; writes the cache."""

    @abc.abstractmethod
    def rms_norm(self, x: str, part: NormPart, path: str) -> str:
        """RMSNorm over the last axis."""

    @abc.abstractmethod
    def activation(self, kind: Activation, x: str, path: str) -> str:
        """Activation of the feed-forward, element by element."""

    def norm_of_stream(self, part: NormPart, path: str) -> str:
        """Norm of the residual stream with all that was added to it."""
        return self.norm(self.settled(path), part, path)

    def last_states(self) -> str:
        """Hidden states ``[batch, hidden]`` of each row's last token, which alone goes through the last norm."""
        last = self.last_index
        stream = self.stream

        def of_last(name: str, path: str) -> str:
            return self.writer.node("GatherND", [name, last], f"{path}/GatherND", batch_dims=1)

        stream.value = of_last(stream.value, "/last/stream")
        stream.pending = [of_last(name, f"/last/pending.{place}") for place, name in enumerate(stream.pending)]
        return self.norm_of_stream(self.parts.final_norm, "/final_norm")

    def norm(self, x: str, part: NormPart, path: str) -> str:
        """LayerNorm or RMSNorm over the last axis."""
        if part.kind == "rms":
            return self.rms_norm(x, part, path)
        tensors = [self.tensor(path, "weight", part.weight)]
        if part.bias is not None:
            tensors.append(self.tensor(path, "bias", part.bias))
        name = f"{path}/LayerNormalization"
        return self.writer.node("LayerNormalization", [x, *tensors], name, axis=-1, epsilon=part.epsilon)

    def settled(self, path: str) -> str:
        """Residual stream with everything added. ``Sum``, not ``Add``: see :mod:`exporters.residuals`."""
        stream = self.stream
        addends = [stream.value, *stream.pending]
        if stream.bias is not None:
            addends.append(self.tensor(path, "residual_bias", stream.bias))
        if len(addends) > 1:
            stream.value = self.writer.node("Sum", addends, f"{path}/Sum")
        stream.pending, stream.bias = [], None
        return stream.value

    def tensor(self, path: str, role: str, tensor: Tensor) -> str:
        """Name of a tensor of the model, as ``layers.0.attention.output.weight``."""
        return self.writer.weight(f"{path.strip('/').replace('/', '.')}.{role}", tensor)

    def product(self, x: str, weight: Tensor, path: str) -> str:
        """Matrix product with the transpose of ``weight``, ``[out, in]``; what a linear is without its bias."""
        return self.writer.node("MatMul", [x, self.tensor(path, "weight", weight.T)], f"{path}/MatMul")

    def linear(self, x: str, part: LinearPart, path: str) -> str:
        """Linear with its bias."""
        product = self.product(x, part.weight, path)
        if part.bias is None:
            return product
        return self.writer.node("Add", [product, self.tensor(path, "bias", part.bias)], f"{path}/Add")

    def length(self, name: str, path: str) -> str:
        """Size of the second axis of a tensor, a scalar."""
        shape = self.writer.node("Shape", [name], f"{path}/Shape")
        return self.writer.node("Gather", [shape, self.writer.constant(1)], f"{path}/Gather")

    @cached_property
    def sequence(self) -> str:
        """Tokens a row in this call, a scalar."""
        return self.length("input_ids", "/sequence")

    @cached_property
    def rotary_tables(self) -> tuple[str, str]:
        """Cosine and sine of every position and frequency, ``[max_length, dims / 2]``, as transformers round them."""
        assert self.parts.rotary is not None
        rotary = self.parts.rotary
        angles = torch.outer(torch.arange(self.max_length, dtype=torch.float32), rotary.frequencies.float().cpu())
        cosine, sine = angles.cos() * rotary.scale, angles.sin() * rotary.scale
        return self.tensor("/rotary", "cosine", cosine), self.tensor("/rotary", "sine", sine)

    @cached_property
    def _angles(self) -> tuple[str, str]:
        """Cosine and sine at the positions of this call, ``[batch, sequence, 1, dims / 2]``."""
        names = []
        for role, table in zip(("cosine", "sine"), self.rotary_tables, strict=True):
            rows = self.writer.node("Gather", [table, self.positions], f"/rotary/{role}/Gather")
            names.append(self.writer.node("Unsqueeze", [rows, self.writer.constant([2])], f"/rotary/{role}/Unsqueeze"))
        return names[0], names[1]

    def states(self, x: str, part: AttentionPart, name: Projection, path: str, turned: bool) -> str:
        """Queries, keys or values of this call, normed, and turned if asked: ``[batch, sequence, heads, head_dim]``."""
        count = part.n_heads if name == "query" else part.n_kv_heads
        linear = {"query": part.query, "key": part.key, "value": part.value}[name]
        norm = {"query": part.query_norm, "key": part.key_norm, "value": None}[name]
        by_head = self.writer.constant([0, 0, count, part.head_dim])
        state = self.linear(x, linear, f"{path}/{name}")
        state = self.writer.node("Reshape", [state, by_head], f"{path}/{name}/Reshape")
        if norm is not None:
            state = self.norm(state, norm, f"{path}/{name}_norm")
        if turned and name != "value":
            state = self.rotated(state, part.head_dim, f"{path}/{name}_rotary")
        return state

    def rotated(self, x: str, head_dim: int, path: str) -> str:
        """Heads ``[batch, sequence, heads, head_dim]`` turned by their positions."""
        assert self.parts.rotary is not None
        half = len(self.parts.rotary.frequencies)
        sizes = [half, half, head_dim - 2 * half] if head_dim > 2 * half else [half, half]
        pieces = [f"{path}/Split_output_{index}" for index in range(len(sizes))]
        self.writer.node("Split", [x, self.writer.constant(sizes)], f"{path}/Split", outputs=pieces, axis=-1)
        cosine, sine = self._angles

        def multiplied(piece: int, factor: str, name: str) -> str:
            return self.writer.node("Mul", [pieces[piece], factor], f"{path}/{name}")

        pairs = ("Sub", multiplied(0, cosine, "cosine_0"), multiplied(1, sine, "sine_1"))
        turned = ("Add", multiplied(1, cosine, "cosine_1"), multiplied(0, sine, "sine_0"))
        halves = [self.writer.node(op, [left, right], f"{path}/{op}") for op, left, right in (pairs, turned)]
        return self.writer.node("Concat", [*halves, *pieces[2:]], f"{path}/Concat", axis=-1)

    def past(self, cached: CachedLayer) -> list[str]:
        """Names of a layer's cache, ``[batch, n_kv_heads, past, head_dim]``; empty ones in a graph that keeps none.

        A Reshape lets caches without tokens in that have other heads. It copies nothing, so one buffer can still be
        bound as past and present; behind a Slice, each call would copy all of it.
        """
        if not self.keeps_cache:
            return ["", ""]
        shape = [0, cached.n_kv_heads, -1, cached.head_dim]
        axes = f"heads_of_layer_{cached.layer}", f"width_of_layer_{cached.layer}"
        heads, width = axes if self.any_empty_cache else (cached.n_kv_heads, cached.head_dim)
        names = []
        for name in cached.past:
            self.writer.input(name, ["batch", heads, "past", width], TensorProto.FLOAT)
            if self.any_empty_cache:
                path = f"/{name.replace('.', '/')}/Reshape"
                name = self.writer.node("Reshape", [name, self.writer.constant(shape)], path)
            names.append(name)
        for name in cached.present:
            self.writer.output(name, ["batch", cached.n_kv_heads, "present", cached.head_dim])
        return names

    def _embedded(self) -> str:
        embedding = self.tensor("/embedding", "weight", self.parts.embedding)
        tokens = self.writer.node("Gather", [embedding, self.ids], "/embedding/Gather")
        if self.parts.positions is None:
            return tokens
        table = self.tensor("/positions", "weight", self.parts.positions[: self.max_length])
        places = self.writer.node("Gather", [table, self.positions], "/positions/Gather")
        return self.writer.node("Add", [tokens, places], "/embedding/Add")

    def _layer(self, index: int, layer: LayerPart) -> None:
        path = f"/layers.{index}"
        blocks: list[tuple[str, NormPart | None, Block]] = [
            ("attention", layer.attention_norm, layer.attention),
            ("feed_forward", layer.feed_forward_norm, layer.feed_forward),
        ]
        # Blocks of one group read the stream before any of them adds to it.
        for group in [blocks] if layer.parallel else [[block] for block in blocks]:
            normed = [
                ""
                if norm is None or isinstance(part, DroppedPart)
                else self.norm_of_stream(norm, f"{path}/{name}_norm")
                for name, norm, part in group
            ]
            for x, (name, _, part) in zip(normed, group, strict=True):
                self._block(x, part, index, f"{path}/{name}")

    def _block(self, x: str, part: Block, index: int, path: str) -> None:
        """Add a block to the residual stream; biases of its last linear wait with the constants there."""
        if isinstance(part, DroppedPart):
            self.stream.add_constant(part.bias)
            return
        if isinstance(part, AttentionPart):
            hidden, last, name = self.attend(x, part, self.cached[index], path), part.output, "output"
        else:
            hidden, last, name = self._inner(x, part, path), part.down, "down"
        self.stream.add(self.product(hidden, last.weight, f"{path}/{name}"))
        self.stream.add_constant(last.bias)

    def _inner(self, x: str, part: FeedForwardPart, path: str) -> str:
        """Feed-forward before its last linear, ``[batch, sequence, width]``."""
        if part.gate is None:
            return self.activation(part.activation, self.linear(x, part.up, f"{path}/up"), f"{path}/activation")
        gate = self.linear(x, part.gate, f"{path}/gate")
        up = self.linear(x, part.up, f"{path}/up")
        return self.writer.node(
            "Mul", [self.activation(part.activation, gate, f"{path}/activation"), up], f"{path}/Mul"
        )

    def _head_of_last(self) -> None:
        """Logits ``[batch, 1, vocabulary]``; only each row's last token goes through the last norm and the head."""
        logits = self._scores(self.last_states())
        self.writer.node("Unsqueeze", [logits, self.writer.constant([1])], "/head/Unsqueeze", outputs=["logits"])

    def _head_of_all(self, vocabulary: int) -> None:
        normed = self.norm_of_stream(self.parts.final_norm, "/final_norm")
        hidden = self.parts.embedding.shape[1]
        rows = self.writer.node("Reshape", [normed, self.writer.constant([-1, hidden])], "/head/rows/Reshape")
        shape = self.writer.node("Shape", ["input_ids"], "/head/Shape")
        shape = self.writer.node("Concat", [shape, self.writer.constant([vocabulary])], "/head/Concat", axis=0)
        self.writer.node("Reshape", [self._scores(rows), shape], "/head/Reshape", outputs=["logits"])

    def _scores(self, rows: str) -> str:
        """Logits of rows ``[n, hidden]``. A tied head reads the embedding as it lies there, so the file has it once."""
        head = self.parts.head
        inputs = [rows, "embedding.weight" if head is None else self.tensor("/head", "weight", head.weight)]
        if head is not None and head.bias is not None:
            inputs.append(self.tensor("/head", "bias", head.bias))
        return self.writer.node("Gemm", inputs, "/head/Gemm", transB=1)


def scalar(writer: GraphWriter, value: float) -> str:
    """Name of a float32 scalar."""
    return writer.constant(value, np.float32)
