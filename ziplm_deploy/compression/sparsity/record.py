"""What sparsification did to a model, linear by linear, as a file beside its weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.recipe import SparsityConfig


class LinearSparsity(BaseModel):
    """Zeros of one linear, and what they cost."""

    name: str  # dotted, in the model
    shape: tuple[int, int]  # [outputs, inputs]
    density: float  # share of the weights that are not zero
    relative_error: float  # Σ‖Ŵx + b̂ − Wx − b‖² / Σ‖Wx + b‖² over the tokens of the last pass
    damping: float  # λ added to the Hessian's diagonal in the last pass
    sensitivity: float | None = None  # divergence of the model with this linear alone sparse; None: not measured


class SparsityRecord(Artifact):
    """What ``sparsify_model`` did to a model."""

    KIND: ClassVar[str] = "sparsity_record"

    sparsity: float  # share of zeros in the weights of all linears below
    pattern: Literal["unstructured", "block4"]
    distribution: Literal["uniform", "sensitivity"]
    passes: int
    relative_damping: float  # as asked for; more was taken where `damping` is not this share of the mean diagonal
    n_tokens: int  # calibration tokens, padding excluded
    linears: list[LinearSparsity]

    @classmethod
    def of_nothing(cls, config: SparsityConfig) -> SparsityRecord:
        """Record of a model in which nothing was left to zero."""
        return cls(
            sparsity=0.0,
            pattern=config.pattern,
            distribution=config.distribution,
            passes=config.passes,
            relative_damping=config.damping,
            n_tokens=0,
            linears=[],
        )
