"""Forward pass over plain parts in torch, written to be read: what files of cut models are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@torch.no_grad()
def reference_logits(parts: DecoderParts, ids: Tensor) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` of ids without padding."""
    x = parts.embedding[ids]
    if parts.positions is not None:
        x = x + parts.positions[: ids.shape[1]]
    for layer in parts.layers:
        if layer.parallel:
            x = (
                x
                + _block(x, layer.attention_norm, layer.attention, parts.rotary)
                + _block(x, layer.feed_forward_norm, layer.feed_forward, parts.rotary)
            )
        else:
            x = x + _block(x, layer.attention_norm, layer.attention, parts.rotary)
            x = x + _block(x, layer.feed_forward_norm, layer.feed_forward, parts.rotary)
    head = parts.head or LinearPart(parts.embedding)
    return _linear(head, _norm(parts.final_norm, x))


def _block(
    x: Tensor,
    norm: NormPart | None,
    part: AttentionPart | FeedForwardPart | DroppedPart,
    rotary: RotaryPart | None,
) -> Tensor:
    if isinstance(part, DroppedPart):
        return torch.zeros_like(x) if part.bias is None else part.bias.expand_as(x)
    assert norm is not None
    x = _norm(norm, x)
    if isinstance(part, AttentionPart):
        return _attention(part, x, rotary)
    activation = ACTIVATIONS[part.activation]
    up = _linear(part.up, x)
    return _linear(part.down, activation(up) if part.gate is None else activation(_linear(part.gate, x)) * up)


def _attention(part: AttentionPart, x: Tensor, rotary: RotaryPart | None) -> Tensor:
    batch_size, tokens, _ = x.shape
    states = []
    for linear, count, norm, turns in (
        (part.query, part.n_heads, part.query_norm, True),
        (part.key, part.n_kv_heads, part.key_norm, True),
        (part.value, part.n_kv_heads, None, False),
    ):
        state = _linear(linear, x).reshape(batch_size, tokens, count, part.head_dim)
        state = state if norm is None else _norm(norm, state)
        state = _turned(state, rotary) if turns and rotary is not None else state
        states.append(state.repeat_interleave(part.n_heads // count, dim=2))
    query, key, value = states  # [batch, tokens, n_heads, head_dim]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * part.scale
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (distance >= 0) & (distance < (part.window or tokens))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    context = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    return _linear(part.output, context.reshape(batch_size, tokens, -1))


def _turned(state: Tensor, rotary: RotaryPart) -> Tensor:
    half = len(rotary.frequencies)
    angles = torch.outer(torch.arange(state.shape[1], dtype=torch.float32), rotary.frequencies)[:, None, :]
    cosine, sine = angles.cos() * rotary.scale, angles.sin() * rotary.scale
    first, second, rest = state[..., :half], state[..., half : 2 * half], state[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def _linear(part: LinearPart, x: Tensor) -> Tensor:
    return functional.linear(x, part.weight, part.bias)


def _norm(part: NormPart, x: Tensor) -> Tensor:
    if part.kind == "layer":
        return functional.layer_norm(x, part.weight.shape, part.weight, part.bias, part.epsilon)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + part.epsilon) * part.weight


def greedy(parts: DecoderParts, ids: Tensor, n_tokens: int) -> list[int]:
    """Ids of a prompt ``[1, tokens]`` and the likeliest ``n_tokens`` after it."""
    for _ in range(n_tokens):
        ids = torch.cat([ids, reference_logits(parts, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return [int(token) for token in ids[0]]
