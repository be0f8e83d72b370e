"""Graphs for ONNX Runtime: one GroupQueryAttention a layer, with its own head counts and a cache that stays in place.

Positions come from the lengths that ``attention_mask`` gives, so rows of a batch are padded on the right. ``total``
tokens are those of the longest row; rows that are shorter overwrite their padding.
"""

from __future__ import annotations

from functools import cached_property

import torch
from onnx import TensorProto

from exporters.decoder_cache import CachedLayer
from exporters.decoder_graph import DecoderGraph, Projection
from exporters.decoder_parts import Activation, AttentionPart, LinearPart, NormPart

CONTRIB = "com.microsoft"
# What GroupQueryAttention demands of head_dim, and of it and the frequencies if it turns heads by itself.
HEAD_DIM_STEP = 8
_ROTARY_HEAD_DIM_STEP, _ROTARY_STEP = 16, 8


class FusedGraph(DecoderGraph):
    """Graph with contrib operators of ONNX Runtime."""

    def declare_positions(self) -> None:
        pass  # they follow from the lengths

    def is_windowed(self, part: AttentionPart) -> bool:
        """True where a text can be longer than the window."""
        return part.window is not None and part.window < self.max_length

    @property
    def oldest_engine(self) -> str:
        """Oldest release of ONNX Runtime that answers right.

        Before 1.24 windows have a token too many; before 1.20 a prompt in several calls is answered wrong.
        """
        attentions = (layer.attention for layer in self.parts.layers)
        windowed = any(isinstance(part, AttentionPart) and self.is_windowed(part) for part in attentions)
        return "1.24" if windowed else "1.20"

    @cached_property
    def lengths(self) -> str:
        """Tokens a row, past ones included, ``[batch]``."""
        inputs = ["attention_mask", self.writer.constant([1])]
        return self.writer.node("ReduceSum", inputs, "/lengths/ReduceSum", keepdims=0)

    @cached_property
    def _last_places(self) -> str:
        return self.writer.node("Sub", [self.lengths, self.writer.constant(1)], "/lengths/Sub")

    @cached_property
    def positions(self) -> str:
        # In the first call a row with padding is shorter than the call, and begins at 0 nevertheless.
        zero = self.writer.constant(0)
        start = self.writer.node("Sub", [self.lengths, self.sequence], "/positions/Sub")
        start = self.writer.node("Max", [start, zero], "/positions/Max")
        start = self.writer.node("Unsqueeze", [start, self.writer.constant([1])], "/positions/Unsqueeze")
        steps = self.writer.node("Range", [zero, self.sequence, self.writer.constant(1)], "/positions/Range")
        return self.writer.node("Add", [start, steps], "/positions/Add")

    @cached_property
    def last_index(self) -> str:
        end = self.writer.node("Sub", [self.sequence, self.writer.constant(1)], "/last/Sub")
        index = self.writer.node("Min", [self._last_places, end], "/last/Min")
        return self.writer.node("Unsqueeze", [index, self.writer.constant([1])], "/last/Unsqueeze")

    @cached_property
    def _cache_lengths(self) -> tuple[str, str]:
        """Int32 as the operator wants them: a row's last place ``[batch]``, and the tokens of the longest row."""
        total = self.length("attention_mask", "/total")
        places, longest = (
            self.writer.node("Cast", [name], f"{path}/Cast", to=TensorProto.INT32)
            for name, path in ((self._last_places, "/lengths"), (total, "/total"))
        )
        return places, longest

    def norm_of_stream(self, part: NormPart, path: str) -> str:
        stream = self.stream
        if part.kind != "rms" or not stream.pending:
            return super().norm_of_stream(part, path)
        last = stream.pending.pop()
        # Constants are added before: the operator has an input for them, which ONNX Runtime 1.19 leaves out of the sum.
        inputs = [self.settled(path), last, self.tensor(path, "weight", part.weight)]
        op = "SkipSimplifiedLayerNormalization"
        stream.value = f"{path}/{op}_output_3"
        outputs = [f"{path}/{op}_output_0", "", "", stream.value]
        return self.writer.node(op, inputs, f"{path}/{op}", outputs=outputs, domain=CONTRIB, epsilon=part.epsilon)

    def rms_norm(self, x: str, part: NormPart, path: str) -> str:
        op = "SimplifiedLayerNormalization"
        inputs = [x, self.tensor(path, "weight", part.weight)]
        return self.writer.node(op, inputs, f"{path}/{op}", axis=-1, epsilon=part.epsilon, stash_type=1)

    def activation(self, kind: Activation, x: str, path: str) -> str:
        if kind == "relu":
            return self.writer.node("Relu", [x], f"{path}/Relu")
        if kind == "silu":
            return self.writer.node("QuickGelu", [x], f"{path}/QuickGelu", domain=CONTRIB, alpha=1.0)
        op = "FastGelu" if kind == "gelu_tanh" else "Gelu"
        return self.writer.node(op, [x], f"{path}/{op}", domain=CONTRIB)

    def attend(self, x: str, part: AttentionPart, cached: CachedLayer, path: str) -> str:
        rotary = self.parts.rotary
        inside = (
            rotary is not None
            and part.head_dim % _ROTARY_HEAD_DIM_STEP == 0
            and len(rotary.frequencies) % _ROTARY_STEP == 0
        )
        turned = rotary is not None and not inside
        if turned or part.query_norm is not None or part.key_norm is not None:
            states = self._separate(x, part, path, turned)
        else:
            states = [self.linear(x, packed(part), f"{path}/qkv"), "", ""]
        inputs = [*states, *self.past(cached), *self._cache_lengths, *(self.rotary_tables if inside else ())]
        fields = {"local_window_size": part.window} if self.is_windowed(part) else {}
        op = "GroupQueryAttention"
        return self.writer.node(
            op,
            inputs,
            f"{path}/{op}",
            outputs=[f"{path}/{op}_output_0", *cached.present],
            domain=CONTRIB,
            num_heads=part.n_heads,
            kv_num_heads=part.n_kv_heads,
            scale=part.scale,
            do_rotary=int(inside),
            rotary_interleaved=0,
            **fields,
        )

    def _separate(self, x: str, part: AttentionPart, path: str, turned: bool) -> list[str]:
        """Queries, keys and values, ``[batch, sequence, heads * head_dim]`` each, with norms and turns of their own."""

        def flat(name: Projection, count: int) -> str:
            shape = self.writer.constant([0, 0, count * part.head_dim])
            state = self.states(x, part, name, path, turned)
            return self.writer.node("Reshape", [state, shape], f"{path}/{name}/Reshape_1")

        values = self.linear(x, part.value, f"{path}/value")
        return [flat("query", part.n_heads), flat("key", part.n_kv_heads), values]


def packed(part: AttentionPart) -> LinearPart:
    """Queries, keys and values as one linear, ``[(n_heads + 2 * n_kv_heads) * head_dim, hidden]``."""
    linears = (part.query, part.key, part.value)
    weight = torch.cat([each.weight.detach() for each in linears])
    if all(each.bias is None for each in linears):
        return LinearPart(weight)
    biases = [weight.new_zeros(len(each.weight)) if each.bias is None else each.bias.detach() for each in linears]
    return LinearPart(weight, torch.cat(biases))
