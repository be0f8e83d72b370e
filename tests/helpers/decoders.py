"""A causal language model computed from its parts alone, in plain torch: the oracle of exporters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.decoder_parts import (
    AttentionPart,
    DecoderParts,
    DroppedPart,
    FeedForwardPart,
    LinearPart,
    NormPart,
    RotaryPart,
)

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


@torch.no_grad()
def reference_logits(parts: DecoderParts, ids: Tensor) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` of token ids ``[batch, tokens]`` that start at position 0."""
    stream = parts.embedding[ids]  # [batch, tokens, hidden]
    if parts.positions is not None:
        stream = stream + parts.positions[: ids.shape[1]]
    for layer in parts.layers:
        before = stream
        stream = stream + _block(stream, layer.attention_norm, layer.attention, parts.rotary)
        read = before if layer.parallel else stream
        stream = stream + _block(read, layer.feed_forward_norm, layer.feed_forward, parts.rotary)
    head = parts.head or LinearPart(parts.embedding)
    return _linear(_norm(stream, parts.final_norm), head)


def _block(
    stream: Tensor,
    norm: NormPart | None,
    block: AttentionPart | FeedForwardPart | DroppedPart,
    rotary: RotaryPart | None,
) -> Tensor:
    if isinstance(block, DroppedPart):
        return torch.zeros(()) if block.bias is None else block.bias
    x = _norm(stream, norm)
    return _attention(x, block, rotary) if isinstance(block, AttentionPart) else _feed_forward(x, block)


def _feed_forward(x: Tensor, block: FeedForwardPart) -> Tensor:
    up, activation = _linear(x, block.up), ACTIVATIONS[block.activation]
    inner = activation(up) if block.gate is None else activation(_linear(x, block.gate)) * up
    return _linear(inner, block.down)


def _attention(x: Tensor, block: AttentionPart, rotary: RotaryPart | None) -> Tensor:
    batch, tokens, _ = x.shape

    def heads(part: LinearPart, norm: NormPart | None = None) -> Tensor:
        split = _linear(x, part).reshape(batch, tokens, -1, block.head_dim)
        return (_norm(split, norm) if norm is not None else split).transpose(1, 2)  # [batch, heads, tokens, head_dim]

    query, key = heads(block.query, block.query_norm), heads(block.key, block.key_norm)
    if rotary is not None:
        query, key = _rotated(query, rotary), _rotated(key, rotary)
    repeats = block.n_heads // block.n_kv_heads
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, heads(block.value)))
    scores = block.scale * query @ key.transpose(2, 3)  # [batch, heads, tokens, tokens]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    unseen = (distance < 0) | (distance >= (block.window or tokens + 1))
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    return _linear((weights @ value).transpose(1, 2).reshape(batch, tokens, -1), block.output)


def _rotated(x: Tensor, rotary: RotaryPart) -> Tensor:
    half = len(rotary.frequencies)
    angles = torch.arange(x.shape[2])[:, None] * rotary.frequencies  # [tokens, half]
    cosine, sine = rotary.scale * angles.cos(), rotary.scale * angles.sin()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


def _linear(x: Tensor, part: LinearPart) -> Tensor:
    return nn.functional.linear(x, part.weight, part.bias)


def _norm(x: Tensor, norm: NormPart | None) -> Tensor:
    assert norm is not None
    if norm.kind == "layer":
        return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon) * norm.weight
