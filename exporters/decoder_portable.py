"""Graphs of standard operators only, for any runtime: masks, turns and the growing cache are spelled out.

Positions are an input, so rows may be padded on either side. Keys of a batch lie where their call put them, padding
included; ``attention_mask`` says which to leave out.
"""

from __future__ import annotations

import math
from functools import cached_property

from onnx import TensorProto

from exporters.decoder_cache import CachedLayer
from exporters.decoder_graph import DecoderGraph, Projection, scalar
from exporters.decoder_parts import Activation, AttentionPart, NormPart

# Finite, so that a row of padding, which sees nothing, stays finite, too.
_MASKED = -1.0e30


class PortableGraph(DecoderGraph):
    """Graph with standard operators."""

    @property
    def oldest_engine(self) -> str:
        return "1.19"

    def declare_positions(self) -> None:
        self.writer.input("position_ids", ["batch", "sequence"])

    @property
    def positions(self) -> str:
        return self.given_positions

    @cached_property
    def _total(self) -> str:
        return self.length("attention_mask", "/total")

    @cached_property
    def _past_length(self) -> str:
        return self.writer.node("Sub", [self._total, self.sequence], "/past/Sub")

    def _range(self, start: str, end: str, path: str) -> str:
        return self.writer.node("Range", [start, end, self.writer.constant(1)], f"{path}/Range")

    def _unsqueezed(self, name: str, axes: list[int], path: str) -> str:
        return self.writer.node("Unsqueeze", [name, self.writer.constant(axes)], f"{path}/Unsqueeze")

    @cached_property
    def last_index(self) -> str:
        # The last place that is no padding, on whichever side padding stands.
        places = self._range(self._past_length, self._total, "/last")
        here = self.writer.node("Gather", ["attention_mask", places], "/last/Gather", axis=1)
        steps = self._range(self.writer.constant(0), self.sequence, "/last/steps")
        ranked = self.writer.node("Mul", [here, steps], "/last/Mul")
        ranked = self.writer.node("Cast", [ranked], "/last/Cast", to=TensorProto.INT32)
        return self.writer.node("ArgMax", [ranked], "/last/ArgMax", axis=1, keepdims=1)

    @cached_property
    def _visible(self) -> str:
        """True where a token sees a key: not padding and not later, ``[batch, 1, sequence, total]``."""
        filled = self.writer.node("Cast", ["attention_mask"], "/mask/Cast", to=TensorProto.BOOL)
        filled = self._unsqueezed(filled, [1, 2], "/mask/filled")  # [batch, 1, 1, total]
        keys = self._range(self.writer.constant(0), self._total, "/mask/keys")
        queries = self._range(self._past_length, self._total, "/mask/queries")
        queries = self._unsqueezed(queries, [1], "/mask/queries")  # [sequence, 1]
        causal = self.writer.node("LessOrEqual", [keys, queries], "/mask/LessOrEqual")
        return self.writer.node("And", [filled, causal], "/mask/And")

    @cached_property
    def _distances(self) -> str:
        """Tokens from key to query, padding left out, ``[batch, 1, sequence, total]``."""
        counted = self.writer.node("CumSum", ["attention_mask", self.writer.constant(1)], "/distance/CumSum")
        keys = self.writer.node("Sub", [counted, self.writer.constant(1)], "/distance/keys/Sub")
        keys = self._unsqueezed(keys, [1, 2], "/distance/keys")
        queries = self._unsqueezed(self.positions, [1, 3], "/distance/queries")
        return self.writer.node("Sub", [queries, keys], "/distance/Sub")

    @cached_property
    def _masks(self) -> dict[int | None, str]:
        return {}

    def _mask(self, window: int | None) -> str:
        """What to add to scores: 0 or a large negative number, ``[batch, 1, 1, sequence, total]``."""
        if window not in self._masks:
            path = f"/mask/window.{window}"
            visible = self._visible
            if window is not None:
                near = self.writer.node("Less", [self._distances, self.writer.constant(window)], f"{path}/Less")
                visible = self.writer.node("And", [visible, near], f"{path}/And")
            choices = [scalar(self.writer, 0.0), scalar(self.writer, _MASKED)]
            added = self.writer.node("Where", [visible, *choices], f"{path}/Where")
            self._masks[window] = self._unsqueezed(added, [1], path)
        return self._masks[window]

    def rms_norm(self, x: str, part: NormPart, path: str) -> str:
        # ReduceSum looks the same in all opsets; ReduceMean does not.
        squares = self.writer.node("Mul", [x, x], f"{path}/Mul")
        total = self.writer.node("ReduceSum", [squares, self.writer.constant([-1])], f"{path}/ReduceSum", keepdims=1)
        mean = self.writer.node("Mul", [total, scalar(self.writer, 1 / len(part.weight))], f"{path}/Mul_1")
        mean = self.writer.node("Add", [mean, scalar(self.writer, part.epsilon)], f"{path}/Add")
        root = self.writer.node("Sqrt", [mean], f"{path}/Sqrt")
        scaled = self.writer.node("Div", [x, root], f"{path}/Div")
        return self.writer.node("Mul", [scaled, self.tensor(path, "weight", part.weight)], f"{path}/Mul_2")

    def activation(self, kind: Activation, x: str, path: str) -> str:
        if kind == "relu":
            return self.writer.node("Relu", [x], f"{path}/Relu")
        if kind == "silu":
            return self._times(x, self.writer.node("Sigmoid", [x], f"{path}/Sigmoid"), f"{path}/Mul")
        if kind == "gelu":
            inner = self._times(x, scalar(self.writer, math.sqrt(0.5)), f"{path}/Mul")
            curve = self.writer.node("Erf", [inner], f"{path}/Erf")
        else:
            cube = self._times(x, self._times(x, x, f"{path}/Mul"), f"{path}/Mul_1")
            cube = self._times(cube, scalar(self.writer, 0.044715), f"{path}/Mul_2")
            inner = self.writer.node("Add", [x, cube], f"{path}/Add")
            inner = self._times(inner, scalar(self.writer, math.sqrt(2 / math.pi)), f"{path}/Mul_3")
            curve = self.writer.node("Tanh", [inner], f"{path}/Tanh")
        gate = self.writer.node("Add", [curve, scalar(self.writer, 1.0)], f"{path}/Add_1")
        half = self._times(x, scalar(self.writer, 0.5), f"{path}/Mul_4")
        return self._times(half, gate, f"{path}/Mul_5")

    def _times(self, left: str, right: str, name: str) -> str:
        return self.writer.node("Mul", [left, right], name)

    def attend(self, x: str, part: AttentionPart, cached: CachedLayer, path: str) -> str:
        count, width = part.n_kv_heads, part.head_dim
        # Query heads stand in their groups, and a cached head is broadcast over its group.
        queries = self._by_head(x, part, "query", path)
        queries = self._times(queries, scalar(self.writer, part.scale), f"{path}/scale")
        grouped = self.writer.constant([0, count, part.n_heads // count, -1, width])
        queries = self.writer.node("Reshape", [queries, grouped], f"{path}/groups/Reshape")
        past_keys, past_values = self.past(cached)
        keys = self._appended(past_keys, cached.present[0], x, part, "key", path)
        values = self._appended(past_values, cached.present[1], x, part, "value", path)
        keys = self.writer.node("Transpose", [keys], f"{path}/key/turned", perm=[0, 1, 2, 4, 3])
        # Names of products of activations do not end as those of linears do: see exporters.names.
        scores = self.writer.node("MatMul", [queries, keys], f"{path}/scores")
        scores = self.writer.node("Add", [scores, self._mask(part.window)], f"{path}/masked")
        shares = self.writer.node("Softmax", [scores], f"{path}/Softmax", axis=-1)
        context = self.writer.node("MatMul", [shares, values], f"{path}/context")
        by_head = self.writer.constant([0, part.n_heads, -1, width])
        context = self.writer.node("Reshape", [context, by_head], f"{path}/context/Reshape")
        context = self.writer.node("Transpose", [context], f"{path}/context/Transpose", perm=[0, 2, 1, 3])
        flat = self.writer.constant([0, 0, part.n_heads * width])
        return self.writer.node("Reshape", [context, flat], f"{path}/context/Reshape_1")

    def _by_head(self, x: str, part: AttentionPart, name: Projection, path: str) -> str:
        """Queries, keys or values of this call, ``[batch, heads, sequence, head_dim]``."""
        state = self.states(x, part, name, path, turned=self.parts.rotary is not None)
        return self.writer.node("Transpose", [state], f"{path}/{name}/Transpose", perm=[0, 2, 1, 3])

    def _appended(self, past: str, present: str, x: str, part: AttentionPart, name: Projection, path: str) -> str:
        """Keys or values of all tokens, ``[batch, n_kv_heads, 1, total, head_dim]``; without the 1 they are kept."""
        states = self._by_head(x, part, name, path)
        if not past:
            return self._unsqueezed(states, [2], f"{path}/{name}")
        self.writer.node("Concat", [past, states], f"{path}/{name}/Concat", outputs=[present], axis=2)
        return self._unsqueezed(present, [2], f"{path}/{name}")
