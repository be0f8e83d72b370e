"""Kinds of models: what can be pruned in each, what stays as it is, and why; from their names alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig

from ziplm_deploy.models.architectures import ARCHITECTURES, OTHERS, Architecture, why_unsupported
from ziplm_deploy.models.dense import quiet_transformers

# Families whose pruned members were judged with weights that somebody trained; all others with random ones.
_REAL_WEIGHTS = {"bert": "real weights (MiniLM)", "llama": "real weights (SmolLM2)"}
RANDOM_WEIGHTS = "random weights"


@dataclass(frozen=True)
class ModelType:
    """A ``model_type`` of transformers; ``reason`` says why it cannot be pruned, and is empty if it can."""

    model_type: str
    prunable: bool
    pruned: tuple[str, ...] = ()  # what may be taken out of it
    dense: tuple[str, ...] = ()  # what stays as it is
    proof: str = ""  # weights that it was proved with
    reason: str = ""

    def as_row(self) -> dict[str, Any]:
        """Fields as JSON has them."""
        return asdict(self)


def model_type_of(name: str, config: PretrainedConfig | None = None) -> ModelType:
    """What is known about a ``model_type``; any name is answered.

    ``config``: of a model that can be pruned, whose settings may decide between variants of the type.
    """
    architecture = ARCHITECTURES.get(name)
    if config is not None and architecture is not None and architecture.variant is not None:
        architecture = architecture.variant(config)
    if architecture is None:
        return ModelType(name, prunable=False, reason=why_unsupported(name))
    proof = _REAL_WEIGHTS.get(name, RANDOM_WEIGHTS)
    return ModelType(name, prunable=True, pruned=_pruned(architecture), dense=_dense(architecture), proof=proof)


def model_types() -> list[ModelType]:
    """All types that are known here: first those that can be pruned, then those that cannot, by name."""
    return [model_type_of(name) for name in (*ARCHITECTURES, *sorted(OTHERS))]


def _pruned(architecture: Architecture) -> tuple[str, ...]:
    grouped = architecture.config_kv_heads is not None
    return (
        "cached heads, each with the query heads that read it" if grouped else "attention heads",
        "FFN columns, each with its gate" if architecture.is_gated else "FFN columns",
        "whole attention blocks and FFNs",
    )


def _dense(architecture: Architecture) -> tuple[str, ...]:
    if architecture.causal is not None:
        return ("hidden size", "token embeddings", "norms", "positions", "head over the vocabulary")
    with quiet_transformers():  # some default settings do not fit each other
        of_images = hasattr(transformers.CONFIG_MAPPING[architecture.model_type](), "image_size")
    inputs = "patch and position embeddings" if of_images else "word and position embeddings"
    cut = ", cut to the heads that are kept" if architecture.sliced_attention is not None else ""
    shared = (f"{name.replace('_', ' ')} of all layers{cut}" for name in architecture.shared_inputs)
    distances = ("embeddings and buckets of distances",) if architecture.position_projections else ()
    return ("hidden size", inputs, "norms", "head of the task", *distances, *shared)
