"""What GGUF's arch ``deci`` can hold of a causal language model; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from torch import Tensor

from exporters.decoder_parts import AttentionPart, DecoderParts, DroppedPart, FeedForwardPart, LayerPart, NormPart
from exporters.encoder import ExportError
from exporters.gguf_file import FileType

ARCHITECTURE = "deci"


def check_types(*types: str) -> None:
    """Refuse file types that are not written here.

    Raises:
        ExportError: one is not.
    """
    for each in types:
        if each not in get_args(FileType):
            raise ExportError(
                f"expected a file type of {', '.join(get_args(FileType))}, found {each}; choose one of them"
            )


def check_parts(parts: DecoderParts) -> None:
    """Refuse a model that the format cannot hold, or whose parts do not fit each other.

    Raises:
        ExportError: names the part, the layer, and what the format has in its place.
    """
    if parts.positions is not None or parts.rotary is None:
        _refuse("rotary positions", "learned ones" if parts.positions is not None else "none")
    if parts.head is not None and parts.head.bias is not None:
        _refuse("a head without bias", "one with a bias")
    if parts.head is not None:
        _check_shape("the head", parts.head.weight, tuple(parts.embedding.shape))
    for index, layer in enumerate(parts.layers):
        _check_layer(layer, f" in layer {index}")
    norms = [norm for layer in parts.layers for norm in _norms(layer)]
    for norm in [*norms, parts.final_norm]:
        _check_norm(norm)
    epsilons = sorted({norm.epsilon for norm in [*norms, parts.final_norm]})
    if len(epsilons) > 1:
        _refuse("one epsilon for all norms", ", ".join(f"{epsilon:g}" for epsilon in epsilons))
    _check_rotary(parts)
    for index, layer in enumerate(parts.layers):
        for name, weight, shape in _shapes(layer, parts.embedding.shape[1]):
            _check_shape(f"{name} in layer {index}", weight, shape)


def _norms(layer: LayerPart) -> list[NormPart]:
    """Norms that are read: not those of dropped blocks."""
    pairs = ((layer.attention_norm, layer.attention), (layer.feed_forward_norm, layer.feed_forward))
    read = [norm for norm, block in pairs if not isinstance(block, DroppedPart)]
    if None in read:
        _refuse("a norm before every block", "a block without")
    return [norm for norm in read if norm is not None]


def _shapes(layer: LayerPart, hidden: int) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Name, weight and expected shape of each linear."""
    part, block = layer.attention, layer.feed_forward
    if isinstance(part, AttentionPart):
        asking, cached = part.n_heads * part.head_dim, part.n_kv_heads * part.head_dim
        yield "the query", part.query.weight, (asking, hidden)
        yield "the key", part.key.weight, (cached, hidden)
        yield "the value", part.value.weight, (cached, hidden)
        yield "the output", part.output.weight, (hidden, asking)
    if isinstance(block, FeedForwardPart) and block.gate is not None:
        width = block.up.weight.shape[0]
        yield "up", block.up.weight, (width, hidden)
        yield "gate", block.gate.weight, (width, hidden)
        yield "down", block.down.weight, (hidden, width)


def _check_shape(name: str, weight: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(weight.shape) != expected:
        raise ExportError(
            f"expected weights of shape {expected} for {name}, found {tuple(weight.shape)}; "
            "make head counts, widths, vocabulary and weights agree"
        )


def _check_norm(norm: NormPart) -> None:
    if norm.kind != "rms":
        _refuse("RMSNorm", "LayerNorm")
    if norm.bias is not None:
        _refuse("norms without bias", "one with a bias")


def _check_layer(layer: LayerPart, where: str) -> None:
    if layer.parallel:
        _refuse("attention and feed-forward one after the other", f"both on the same input{where}")
    attention, feed_forward = layer.attention, layer.feed_forward
    if isinstance(attention, AttentionPart):
        if attention.query_norm is not None or attention.key_norm is not None:
            _refuse("queries and keys without norms", f"norms of them{where}")
        if attention.n_heads % attention.n_kv_heads:
            _refuse(
                "as many query heads for each cached head", f"{attention.n_heads} for {attention.n_kv_heads}{where}"
            )
    if isinstance(feed_forward, FeedForwardPart):
        if feed_forward.gate is None:
            _refuse("a gated feed-forward", f"one without a gate{where}")
        if feed_forward.activation != "silu":
            _refuse("the activation silu", f"{feed_forward.activation}{where}")


def _check_rotary(parts: DecoderParts) -> None:
    """Every head is rotated whole, and no window is narrower than the context."""
    head_dim = head_size(parts)
    rotated = 2 * len(parts.rotary.frequencies) if parts.rotary is not None else 0
    for index, layer in enumerate(parts.layers):
        if isinstance(layer.attention, DroppedPart):
            continue
        if layer.attention.head_dim != head_dim:
            _refuse("heads of one size", f"{head_dim} and {layer.attention.head_dim}")
        if rotated != head_dim:
            _refuse("rotary positions on whole heads", f"{rotated} of {head_dim} dimensions")
        window = layer.attention.window
        if window is not None and window < parts.max_positions:
            _refuse(
                "attention to all tokens before", f"a window of {window} tokens in layer {index}",
                f"or shorten the context to {window} tokens, where the window changes nothing",
            )  # fmt: skip


def head_size(parts: DecoderParts) -> int:
    """Dimensions of a head; the rotated dimensions where all attention was dropped."""
    sizes = [layer.attention.head_dim for layer in parts.layers if isinstance(layer.attention, AttentionPart)]
    return sizes[0] if sizes else 2 * len(parts.rotary.frequencies) if parts.rotary is not None else 0


def _refuse(expected: str, found: str, alternative: str = "") -> None:
    raise ExportError(
        f"expected {expected} (GGUF, arch {ARCHITECTURE}), found {found}; export the model as ONNX"
        + (f", {alternative}" if alternative else "")
    )
