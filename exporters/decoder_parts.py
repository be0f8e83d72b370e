"""A causal language model as plain parts: all that a writer of files needs, without one library's attribute paths.

What knows those paths takes a model apart once; :mod:`exporters.decoder` writes the parts as ONNX. Tensors are those of
the model, not copies, in its own precision; writers convert one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class LinearPart:
    """``y = weight @ x + bias`` with ``weight`` ``[out, in]`` and ``bias`` ``[out]`` or none."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class NormPart:
    """LayerNorm or RMSNorm over the last axis, ``weight`` and ``bias`` ``[size]``."""

    kind: Literal["layer", "rms"]
    weight: Tensor
    epsilon: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class RotaryPart:
    """Rotary positions on the first ``2 * len(frequencies)`` dimensions of a head, halves rotated against each other.

    ``frequencies``: float32 ``[dims / 2]``, radians a position; ``scale``: factor on cosine and sine.
    """

    frequencies: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class AttentionPart:
    """Causal attention of ``n_heads`` query heads over ``n_kv_heads`` cached ones, ``head_dim`` wide.

    Query heads ``[g * k, (g + 1) * k)`` with ``k = n_heads / n_kv_heads`` read cached head ``g``.
    """

    query: LinearPart  # [n_heads * head_dim, hidden]
    key: LinearPart  # [n_kv_heads * head_dim, hidden]
    value: LinearPart
    output: LinearPart  # [hidden, n_heads * head_dim]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float  # of query times key
    query_norm: NormPart | None = None  # over head_dim, before rotary positions
    key_norm: NormPart | None = None
    window: int | None = None  # a token sees itself and the ``window - 1`` before; None: all


@dataclass(frozen=True)
class FeedForwardPart:
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` without a gate."""

    up: LinearPart  # [width, hidden]
    down: LinearPart  # [hidden, width]
    activation: Activation
    gate: LinearPart | None = None


@dataclass(frozen=True)
class DroppedPart:
    """What is left of a block that was dropped: a constant ``[hidden]`` on the residual stream, or nothing."""

    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerPart:
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    ``parallel``: both read the stream as it came into the layer (GPT-NeoX), not one after the other. Norms of dropped
    blocks are not read.
    """

    attention_norm: NormPart | None
    attention: AttentionPart | DroppedPart
    feed_forward_norm: NormPart | None
    feed_forward: FeedForwardPart | DroppedPart
    parallel: bool = False


@dataclass(frozen=True)
class DecoderParts:
    """A whole pre-norm causal language model.

    Attributes:
        embedding: ``[vocabulary, hidden]``.
        positions: learned positions ``[max_positions, hidden]``, row 0 for the first token; None: rotary ones.
        head: ``[vocabulary, hidden]``; None: the embedding itself.
        max_positions: tokens that the model was trained for.
    """

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[LayerPart, ...]
    final_norm: NormPart
    head: LinearPart | None
    rotary: RotaryPart | None
    max_positions: int
