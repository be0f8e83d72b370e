"""Layers of a causal language model as llama.cpp's arch ``deci`` holds them, whatever was dropped.

A file layer is an attention block and then a feed-forward block. Blocks are added one after the other to the residual
stream, so those that were kept fill the layers in their order, and a dropped one is not there. Its constant is added to
the bias of the block before it: nothing reads the stream in between. What the format cannot leave out is written as
zeros, which is exact:

- attention of the first layer, from whose head count llama.cpp takes those of the model: one head of zeros;
- feed-forward after attention: a width of 0 would lose the attention's output, so it is 32 columns of zeros.

Feed-forward widths are filled up with zeros to multiples of 32, the blocks of quantized types.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.decoder_parts import (
    AttentionPart,
    DroppedPart,
    FeedForwardPart,
    LayerPart,
    LinearPart,
    NormPart,
    RotaryPart,
)
from exporters.encoder import ExportError
from exporters.gguf_file import BLOCK, FileTensor, FileType, matrix, vector

_USUAL_BASE, _MAX_BASE = 10_000.0, 1e30  # the latter within float32
_PLAIN = 2e-6  # relative difference of frequencies that rounding to float32 explains


@dataclass(frozen=True)
class FileLayer:
    """One layer of the file; without attention it has no tensors of it."""

    attention_norm: Tensor | None
    attention: AttentionPart | None
    feed_forward_norm: Tensor | None
    feed_forward: FeedForwardPart | None

    @property
    def width(self) -> int:
        """Columns of the feed-forward block in the file."""
        if self.feed_forward is None:
            return BLOCK
        return math.ceil(self.feed_forward.up.weight.shape[0] / BLOCK) * BLOCK


def file_layers(layers: Sequence[LayerPart], hidden: int, head_dim: int) -> list[FileLayer]:
    """Layers to write for those of a model, in their order; at least one.

    Args:
        layers: attention and feed-forward one after the other in each, none ``parallel``.
        hidden: width of the residual stream.
        head_dim: of all heads.
    """
    kept: list[FileLayer] = []
    for norm, block in _blocks(layers):
        if isinstance(block, AttentionPart):
            kept.append(FileLayer(_weight(norm), block, None, None))
        elif isinstance(block, FeedForwardPart):
            if not kept or kept[-1].feed_forward is not None:
                kept.append(FileLayer(None, None, None, None))
            kept[-1] = dataclasses.replace(kept[-1], feed_forward_norm=_weight(norm), feed_forward=block)
        elif block.bias is not None:
            kept[-1:] = [_with_constant(kept[-1] if kept else _nothing(hidden, head_dim), block.bias)]
    if not kept or kept[0].attention is None:
        nothing = _nothing(hidden, head_dim)
        rest = kept[0] if kept else nothing
        kept[:1] = [dataclasses.replace(rest, attention_norm=nothing.attention_norm, attention=nothing.attention)]
    return kept


def layer_tensors(
    index: int, layer: FileLayer, hidden: int, file_type: FileType, query_factor: float
) -> list[FileTensor]:
    """Tensors of one layer under llama.cpp's names; ``query_factor`` is on top of ``attention.scale``."""
    prefix = f"blk.{index}."
    tensors: list[FileTensor] = []
    if layer.attention is not None and layer.attention_norm is not None:
        tensors.append(vector(f"{prefix}attn_norm.weight", layer.attention_norm))
        tensors += _attention_tensors(prefix, layer.attention, file_type, query_factor)
    norm = layer.feed_forward_norm
    tensors.append(vector(f"{prefix}ffn_norm.weight", torch.ones(hidden) if norm is None else norm))
    block = layer.feed_forward or _no_columns(hidden)
    tensors += _feed_forward_tensors(prefix, block, layer.width, file_type)
    return tensors


def rotary_keys(rotary: RotaryPart) -> tuple[float, Tensor | None]:
    """Base of the frequencies, and what to divide each by: None where they are ``base ** (-2 i / dims)``.

    Scaled frequencies (Llama 3) are ``base ** (-2 i / dims) / factor_i``; llama.cpp reads the factors.

    Raises:
        ExportError: frequencies are not positive and finite.
    """
    frequencies = rotary.frequencies.detach().double().cpu()
    if not bool((torch.isfinite(frequencies) & (frequencies > 0)).all()):
        raise ExportError(
            "expected positive, finite frequencies of rotary positions, found others; check rope_theta of the config"
        )
    count = len(frequencies)
    # All of them tell the base of plain ones best; known schemes leave the ratio of the first two as it is.
    for last in (count - 1, 1):
        base = _base(frequencies, min(last, count - 1))
        factors = base ** (-torch.arange(count, dtype=torch.float64) / count) / frequencies
        if bool((factors - 1).abs().max() < _PLAIN):
            return base, None
    return base, factors.float()


def _base(frequencies: Tensor, last: int) -> float:
    """Base that the first frequency and that at ``last`` are of, a whole number where float32 allows it."""
    if last == 0:
        return _USUAL_BASE
    base = float((frequencies[0] / frequencies[last]) ** (len(frequencies) / last))
    if not 1 < base < _MAX_BASE:
        return _USUAL_BASE
    return float(round(base)) if abs(round(base) / base - 1) < _PLAIN * len(frequencies) / last else base


def _blocks(
    layers: Sequence[LayerPart],
) -> Iterator[tuple[NormPart | None, AttentionPart | FeedForwardPart | DroppedPart]]:
    for layer in layers:
        yield layer.attention_norm, layer.attention
        yield layer.feed_forward_norm, layer.feed_forward


def _weight(norm: NormPart | None) -> Tensor:
    assert norm is not None  # checked before
    return norm.weight


def _with_constant(layer: FileLayer, constant: Tensor) -> FileLayer:
    """The layer with a constant ``[hidden]`` added to its output."""
    if layer.feed_forward is not None:
        block = layer.feed_forward
        return dataclasses.replace(layer, feed_forward=dataclasses.replace(block, down=_plus(block.down, constant)))
    assert layer.attention is not None  # a kept layer has one block at least
    attention = dataclasses.replace(layer.attention, output=_plus(layer.attention.output, constant))
    return dataclasses.replace(layer, attention=attention)


def _plus(linear: LinearPart, constant: Tensor) -> LinearPart:
    constant = constant.detach().float()
    bias = constant if linear.bias is None else linear.bias.detach().float() + constant
    return LinearPart(linear.weight, bias)


def _nothing(hidden: int, head_dim: int) -> FileLayer:
    """Attention whose output is zero: one head, and one cached one."""
    into, out = torch.zeros(head_dim, hidden), torch.zeros(hidden, head_dim)
    zero = LinearPart(into)
    attention = AttentionPart(zero, zero, zero, LinearPart(out), 1, 1, head_dim, head_dim**-0.5)
    return FileLayer(torch.ones(hidden), attention, None, None)


def _no_columns(hidden: int) -> FeedForwardPart:
    into = LinearPart(torch.zeros(BLOCK, hidden))
    return FeedForwardPart(into, LinearPart(torch.zeros(hidden, BLOCK)), "silu", into)


def _attention_tensors(
    prefix: str, part: AttentionPart, file_type: FileType, query_factor: float
) -> Iterator[FileTensor]:
    # llama.cpp divides by the root of head_dim; positions are linear, so what is left over goes into the query.
    factor = query_factor * part.scale * math.sqrt(part.head_dim)
    yield from _rotated(f"{prefix}attn_q", part.query, part.n_heads, file_type, factor)
    yield from _rotated(f"{prefix}attn_k", part.key, part.n_kv_heads, file_type, 1.0)
    yield from _linear(f"{prefix}attn_v", part.value, file_type)
    yield from _linear(f"{prefix}attn_output", part.output, file_type)


def _feed_forward_tensors(prefix: str, part: FeedForwardPart, width: int, file_type: FileType) -> Iterator[FileTensor]:
    assert part.gate is not None  # checked before anything is written
    yield from _linear(f"{prefix}ffn_gate", part.gate, file_type, out=width)
    yield from _linear(f"{prefix}ffn_up", part.up, file_type, out=width)
    hidden, columns = part.down.weight.shape
    yield matrix(
        f"{prefix}ffn_down.weight",
        (hidden, width),
        file_type,
        lambda: torch.nn.functional.pad(part.down.weight, (0, width - columns)),  # [hidden, width]
    )
    if part.down.bias is not None:
        yield vector(f"{prefix}ffn_down.bias", part.down.bias)


def _linear(name: str, part: LinearPart, file_type: FileType, out: int | None = None) -> Iterator[FileTensor]:
    """Weight and bias, with rows of zeros up to ``out``."""
    rows, columns = part.weight.shape
    more = (out or rows) - rows
    pad = torch.nn.functional.pad
    yield matrix(
        f"{name}.weight", (rows + more, columns), file_type, lambda: pad(part.weight, (0, 0, 0, more))
    )  # [out, in]
    if part.bias is not None:
        yield vector(f"{name}.bias", pad(part.bias, (0, more)))


def _rotated(name: str, part: LinearPart, n_heads: int, file_type: FileType, factor: float) -> Iterator[FileTensor]:
    """A query or key, whose rows llama.cpp rotates in neighbouring pairs."""
    rows, columns = part.weight.shape
    yield matrix(
        f"{name}.weight",
        (rows, columns),
        file_type,
        lambda: interleaved(part.weight.detach().float(), n_heads) * factor,
    )
    if part.bias is not None:
        yield vector(f"{name}.bias", interleaved(part.bias.detach().float(), n_heads) * factor)


def interleaved(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of each head from two halves ``0 1 … | d/2 d/2 + 1 …`` to pairs ``0 d/2 1 d/2 + 1 …``; any rank."""
    half = rows.shape[0] // n_heads // 2
    return rows.reshape(n_heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)
