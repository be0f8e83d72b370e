"""Parts of a causal language model cut by hand: fewer heads, narrower feed-forwards, dropped blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from exporters.decoder_parts import AttentionPart, DecoderParts, DroppedPart, FeedForwardPart, LayerPart, LinearPart

Cut = Callable[[LayerPart], LayerPart]


def with_layers(parts: DecoderParts, cuts: dict[int, Cut]) -> DecoderParts:
    """Parts with the layers of these indices cut."""
    layers = [cuts.get(index, lambda each: each)(layer) for index, layer in enumerate(parts.layers)]
    return dataclasses.replace(parts, layers=tuple(layers))


def keep_groups(*groups: int) -> Cut:
    """Keep these cached heads with all their query heads."""

    def cut(layer: LayerPart) -> LayerPart:
        part = layer.attention
        assert isinstance(part, AttentionPart)
        size = part.n_heads // part.n_kv_heads
        return _with_heads(layer, [head for g in groups for head in range(g * size, (g + 1) * size)], list(groups))

    return cut


def first_queries_of_groups(layer: LayerPart) -> LayerPart:
    """Keep every cached head, and the first query head of each."""
    part = layer.attention
    assert isinstance(part, AttentionPart)
    size = part.n_heads // part.n_kv_heads
    return _with_heads(layer, list(range(0, part.n_heads, size)), list(range(part.n_kv_heads)))


def keep_width(width: int) -> Cut:
    """Keep the last ``width`` columns of the feed-forward."""

    def cut(layer: LayerPart) -> LayerPart:
        part = layer.feed_forward
        assert isinstance(part, FeedForwardPart)
        kept = torch.arange(len(part.up.weight) - width, len(part.up.weight))
        gate = None if part.gate is None else _rows(part.gate, kept)
        down = LinearPart(part.down.weight[:, kept], part.down.bias)
        feed_forward = dataclasses.replace(part, up=_rows(part.up, kept), gate=gate, down=down)
        return dataclasses.replace(layer, feed_forward=feed_forward)

    return cut


def dropped(*names: str, bias: Tensor | None = None) -> Cut:
    """Drop ``attention`` or ``feed_forward`` or both, and their norms with them."""

    def cut(layer: LayerPart) -> LayerPart:
        changes = {name: DroppedPart(bias) for name in names} | {f"{name}_norm": None for name in names}
        return dataclasses.replace(layer, **changes)  # type: ignore[arg-type]

    return cut


def _with_heads(layer: LayerPart, heads: list[int], groups: list[int]) -> LayerPart:
    part = layer.attention
    assert isinstance(part, AttentionPart)
    queries, keys = (
        torch.cat([torch.arange(head * part.head_dim, (head + 1) * part.head_dim) for head in kept])
        for kept in (heads, groups)
    )
    attention = dataclasses.replace(
        part,
        query=_rows(part.query, queries),
        key=_rows(part.key, keys),
        value=_rows(part.value, keys),
        output=LinearPart(part.output.weight[:, queries], part.output.bias),
        n_heads=len(heads),
        n_kv_heads=len(groups),
    )
    return dataclasses.replace(layer, attention=attention)


def _rows(part: LinearPart, rows: Tensor) -> LinearPart:
    return LinearPart(part.weight[rows], None if part.bias is None else part.bias[rows])
