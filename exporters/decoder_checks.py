"""What parts of a causal language model must satisfy to become a graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

from torch import Tensor

from exporters.decoder_parts import (
    Activation,
    AttentionPart,
    DecoderParts,
    DroppedPart,
    FeedForwardPart,
    LinearPart,
    NormPart,
)
from exporters.encoder import ExportError


def weights_bytes(parts: DecoderParts) -> int:
    """Size of all tensors in float32."""
    return sum(4 * tensor.numel() for tensor in _tensors(parts))


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(part):
        for each in dataclasses.fields(part):
            yield from _tensors(getattr(part, each.name))


def check_parts(parts: DecoderParts, max_length: int) -> None:
    """Raise what would make a wrong graph, or none, of ``max_length`` tokens.

    Raises:
        ExportError: shapes, head counts, norms or activations that do not fit together, or too many tokens.
    """
    vocabulary, hidden = parts.embedding.shape
    if not 1 <= max_length <= parts.max_positions:
        raise ExportError(
            f"expected max_length from 1 to {parts.max_positions}, its positions, found {max_length}; shorten it"
        )
    if parts.positions is not None and parts.positions.shape[0] < max_length:
        raise ExportError(
            f"expected learned positions for max_length = {max_length} tokens, found {len(parts.positions)}; shorten it"
        )
    if parts.positions is not None:
        _check_shape("positions", parts.positions, (len(parts.positions), hidden))
    if parts.head is not None:
        _check_linear("head", parts.head, vocabulary, hidden)
    _check_norm("final_norm", parts.final_norm, hidden)
    for index, layer in enumerate(parts.layers):
        path = f"layers[{index}]"
        _check_block(f"{path}.attention", layer.attention, layer.attention_norm, hidden)
        _check_block(f"{path}.feed_forward", layer.feed_forward, layer.feed_forward_norm, hidden)
        if isinstance(layer.attention, AttentionPart) and parts.rotary is not None:
            _check_rotary(path, layer.attention, len(parts.rotary.frequencies))


def _check_block(
    path: str, block: AttentionPart | FeedForwardPart | DroppedPart, norm: NormPart | None, hidden: int
) -> None:
    if isinstance(block, DroppedPart):
        if block.bias is not None:
            _check_shape(f"{path}.bias", block.bias, (hidden,))
        return
    if norm is None:
        raise ExportError(f"expected a norm before {path}, found none; only dropped blocks go without")
    _check_norm(f"{path}_norm", norm, hidden)
    if isinstance(block, AttentionPart):
        _check_attention(path, block, hidden)
    else:
        _check_feed_forward(path, block, hidden)


def _check_attention(path: str, part: AttentionPart, hidden: int) -> None:
    if part.n_kv_heads < 1 or part.n_heads < 1 or part.n_heads % part.n_kv_heads:
        raise ExportError(
            f"expected query heads of {path} in equal groups, one for each cached head, found {part.n_heads} query "
            f"and {part.n_kv_heads} cached heads; prune a cached head with all its query heads"
        )
    if part.window is not None and part.window < 1:
        raise ExportError(f"expected a window of {path} of at least 1 token, found {part.window}; None is no window")
    queries, keys = part.n_heads * part.head_dim, part.n_kv_heads * part.head_dim
    _check_linear(f"{path}.query", part.query, queries, hidden)
    _check_linear(f"{path}.key", part.key, keys, hidden)
    _check_linear(f"{path}.value", part.value, keys, hidden)
    _check_linear(f"{path}.output", part.output, hidden, queries)
    for name, norm in (("query_norm", part.query_norm), ("key_norm", part.key_norm)):
        if norm is not None:
            _check_norm(f"{path}.{name}", norm, part.head_dim)


def _check_feed_forward(path: str, part: FeedForwardPart, hidden: int) -> None:
    if part.activation not in get_args(Activation):
        raise ExportError(
            f"expected the activation of {path} among {', '.join(get_args(Activation))}, found {part.activation}; "
            "choose a model with one of those"
        )
    width = len(part.up.weight)
    if not width:
        raise ExportError(f"expected at least one column in {path}, found none; leave a DroppedPart instead")
    _check_linear(f"{path}.up", part.up, width, hidden)
    _check_linear(f"{path}.down", part.down, hidden, width)
    if part.gate is not None:
        _check_linear(f"{path}.gate", part.gate, width, hidden)


def _check_rotary(path: str, part: AttentionPart, n_frequencies: int) -> None:
    if 2 * n_frequencies > part.head_dim:
        raise ExportError(
            f"expected at most {part.head_dim // 2} rotary frequencies, half of head_dim = {part.head_dim} of "
            f"{path}.attention, found {n_frequencies}; cut them"
        )


def _check_norm(path: str, norm: NormPart, size: int) -> None:
    _check_shape(f"{path}.weight", norm.weight, (size,))
    if norm.bias is not None:
        _check_shape(f"{path}.bias", norm.bias, (size,))
    if norm.kind == "rms" and norm.bias is not None:
        raise ExportError(f"expected no bias in {path}, an RMSNorm, found one; fold it into the linear behind")
    if not (math.isfinite(norm.epsilon) and norm.epsilon >= 0):
        raise ExportError(f"expected epsilon >= 0 of {path}, found {norm.epsilon}; correct the model's config")


def _check_linear(path: str, linear: LinearPart, out: int, size: int) -> None:
    _check_shape(f"{path}.weight", linear.weight, (out, size))
    if linear.bias is not None:
        _check_shape(f"{path}.bias", linear.bias, (out,))


def _check_shape(path: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ExportError(
            f"expected {path} of shape {list(shape)}, found {list(tensor.shape)}; cut all parts of the model alike"
        )
