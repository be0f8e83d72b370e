"""Names and shapes of the cached keys and values of a causal language model, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporters.decoder_parts import AttentionPart, DecoderParts


@dataclass(frozen=True)
class CachedLayer:
    """Cache of one attention: keys and values ``[batch, n_kv_heads, tokens, head_dim]``.

    ``layer`` counts all layers, so that names of layers without attention are skipped, not given to others.
    """

    layer: int
    n_kv_heads: int
    head_dim: int

    @property
    def past(self) -> tuple[str, str]:
        return f"past_key_values.{self.layer}.key", f"past_key_values.{self.layer}.value"

    @property
    def present(self) -> tuple[str, str]:
        return f"present.{self.layer}.key", f"present.{self.layer}.value"


def cached_layers(parts: DecoderParts) -> tuple[CachedLayer, ...]:
    """Layers that have an attention, in order; the others keep nothing between calls."""
    attentions = ((index, layer.attention) for index, layer in enumerate(parts.layers))
    return tuple(
        CachedLayer(index, attention.n_kv_heads, attention.head_dim)
        for index, attention in attentions
        if isinstance(attention, AttentionPart)
    )


def cache_arrays(parts: DecoderParts, batch_size: int, tokens: int = 0) -> dict[str, np.ndarray]:
    """Zeros for every input of the cache: empty by default, or room for ``tokens`` to bind as past and present."""
    return {
        name: np.zeros((batch_size, cached.n_kv_heads, tokens, cached.head_dim), dtype=np.float32)
        for cached in cached_layers(parts)
        for name in cached.past
    }
