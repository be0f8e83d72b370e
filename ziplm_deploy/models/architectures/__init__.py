"""The only room that knows attribute paths of Hugging Face models: an architecture is one entry of ``encoders.py``.

Exporters, quantizers, search and training ask :func:`architecture_of`, or go by the numbered layers that it names.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures.base import Architecture
from ziplm_deploy.models.architectures.encoders import ENCODERS

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "why_not"]

ARCHITECTURES: dict[str, Architecture] = {entry.model_type: entry for entry in ENCODERS}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Entry of a model's configuration.

    Raises:
        UnsupportedModelError: another architecture, or a variant of a supported one whose layers differ
            (decoder, relative positions, …); names what is supported and why this one is refused.
    """
    reason = why_not(config)
    if reason is not None:
        raise UnsupportedModelError(
            f"expected an encoder of type {', '.join(ARCHITECTURES)} with plain self-attention, found {reason}; "
            "choose a supported model"
        )
    return ARCHITECTURES[config.model_type]


def why_not(config: PretrainedConfig) -> str | None:
    """Reason why a configuration cannot be pruned, in words; None if it can."""
    model_type = getattr(config, "model_type", "") or type(config).__name__
    if model_type not in ARCHITECTURES:
        return f"model type {model_type!r}"
    if getattr(config, "is_decoder", False):
        return f"a {model_type} decoder (is_decoder: true): its cached keys and values cannot be resized here"
    if getattr(config, "add_cross_attention", False):
        return f"a {model_type} with cross-attention (add_cross_attention: true)"
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions not in (None, "absolute"):
        return f"a {model_type} with position_embedding_type {positions!r}: its attention scores depend on the head"
    if getattr(config, "chunk_size_feed_forward", 0):
        return f"chunk_size_feed_forward {config.chunk_size_feed_forward}: set it to 0, it only saves training memory"
    if getattr(config, "pruned_heads", None):
        return f"a {model_type} whose heads were pruned before (pruned_heads): save it without them"
    if config.hidden_size % config.num_attention_heads:
        return f"hidden_size {config.hidden_size} that {config.num_attention_heads} heads do not divide"
    return None
