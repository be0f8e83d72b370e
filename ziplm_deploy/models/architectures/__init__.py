"""The only room that knows attribute paths of Hugging Face models.

An architecture is one entry of ``encoders.py``, ``modern.py``, ``relative.py``, ``image_encoders.py``, ``towers.py`` or
``decoders.py``.

Exporters, quantizers, search and training ask :func:`architecture_of`, or go by the numbered layers that it names.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures.base import Architecture
from ziplm_deploy.models.architectures.decoders import DECODERS
from ziplm_deploy.models.architectures.encoders import ENCODERS
from ziplm_deploy.models.architectures.image_encoders import IMAGE_ENCODERS
from ziplm_deploy.models.architectures.modern import MODERN_ENCODERS
from ziplm_deploy.models.architectures.others import OTHERS, native_type, why_unsupported
from ziplm_deploy.models.architectures.relative import RELATIVE
from ziplm_deploy.models.architectures.towers import TOWERS

__all__ = [
    "ARCHITECTURES",
    "CHOICES",
    "OTHERS",
    "Architecture",
    "architecture_of",
    "native_type",
    "why_not",
    "why_unsupported",
]

_FAMILIES = (ENCODERS, MODERN_ENCODERS, RELATIVE, IMAGE_ENCODERS, TOWERS, DECODERS)
ARCHITECTURES: dict[str, Architecture] = {entry.model_type: entry for family in _FAMILIES for entry in family}
# For messages: the first of each family, where all would hide the reason.
CHOICES = (
    f"{', '.join(family[0].model_type for family in _FAMILIES if family)} and models of their kind (run: ziplm-deploy "
    "inspect --types)"
)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Entry of a model's configuration.

    Raises:
        UnsupportedModelError: another architecture, or a variant of a supported one whose layers differ
            (decoder, relative positions, …); says why this one is refused, then what is supported.
    """
    reason = why_not(config)
    if reason is not None:
        raise UnsupportedModelError(
            f"expected a model that can be pruned, found {reason}; choose a supported model: {CHOICES}"
        )
    entry = ARCHITECTURES[config.model_type]
    return entry if entry.variant is None else entry.variant(config)


def why_not(config: PretrainedConfig) -> str | None:
    """Reason why a configuration cannot be pruned, in words; None if it can."""
    model_type = getattr(config, "model_type", "") or type(config).__name__
    if model_type not in ARCHITECTURES:
        return why_unsupported(model_type)
    if getattr(config, "is_decoder", False):
        return f"a {model_type} decoder (is_decoder: true): its cached keys and values cannot be resized here"
    if getattr(config, "add_cross_attention", False):
        return f"a {model_type} with cross-attention (add_cross_attention: true)"
    positions = getattr(config, "position_embedding_type", "absolute")
    is_rotary = ARCHITECTURES[model_type].rotates and positions in ("rope", "rotary", "sans_pos")  # mmBERT's name
    if positions not in (None, "absolute") and not is_rotary:
        return f"a {model_type} with position_embedding_type {positions!r}: its attention scores depend on the head"
    if getattr(config, "chunk_size_feed_forward", 0):
        return f"chunk_size_feed_forward {config.chunk_size_feed_forward}: set it to 0, it only saves training memory"
    if getattr(config, "pruned_heads", None):
        return f"a {model_type} whose heads were pruned before (pruned_heads): save it without them"
    if getattr(config, "drop_path_rate", 0):
        return f"drop_path_rate {config.drop_path_rate}: set it to 0, it only leaves blocks out in training"
    return _settings_reason(config) or _rotary_reason(config) or _heads_reason(config)


def _settings_reason(config: PretrainedConfig) -> str | None:
    """Reason of settings that few architectures have."""
    architecture = ARCHITECTURES[config.model_type]
    for name, known in architecture.refused.items():
        if getattr(config, name, known[0]) not in known:
            why = architecture.why_refused.get(name, "its blocks are other ones")
            return f"a {config.model_type} with {name} {getattr(config, name)!r}: {why}"
    for name, native in architecture.renamed.items():
        found, own = getattr(config, name, None), getattr(config, native, None)
        if found is not None and found != own:
            return (
                f"a {config.model_type} with {name} {found!r}, as code of its own reads it, where transformers reads "
                f"{native}, here {own!r}: write {native} into config.json"
            )
    size = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if size != config.hidden_size:
        return f"a {config.model_type} with embeddings of {size} for a hidden size of {config.hidden_size}"
    return None


def _rotary_reason(config: PretrainedConfig) -> str | None:
    """Reason of an encoder's rotary positions: a file has fixed frequencies. Those of others: ``causal_parts``."""
    if ARCHITECTURES[config.model_type].causal is not None:
        return None
    settings = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    found = [each for each in settings if isinstance(each, dict)]
    found += [each for mapping in found for each in mapping.values() if isinstance(each, dict)]  # by kind of attention
    for kind in (each.get("rope_type", each.get("type")) for each in found):
        if kind in ("dynamic", "longrope"):
            return f"a {config.model_type} with rope_type {kind!r}: its frequencies depend on the length of the text"
    return None


def _heads_reason(config: PretrainedConfig) -> str | None:
    """Reason of head counts that do not fit together."""
    if getattr(config, "head_dim", None) is None and config.hidden_size % config.num_attention_heads:
        return f"hidden_size {config.hidden_size} that {config.num_attention_heads} heads do not divide"
    head_size = getattr(config, "attention_head_size", None)  # DeBERTa's
    if head_size is not None and head_size * config.num_attention_heads != config.hidden_size:
        return f"attention_head_size {head_size}, which {config.num_attention_heads} times is not the hidden_size"
    cached = ARCHITECTURES[config.model_type].config_kv_heads
    n_cached = getattr(config, cached or "", None) or config.num_attention_heads
    if config.num_attention_heads % n_cached:
        return f"{config.num_attention_heads} query heads that {n_cached} cached heads do not divide"
    return None
