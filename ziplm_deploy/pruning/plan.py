"""A pruning plan as a file: the size of every module, and what it is predicted to take and to lose."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ziplm_deploy.artifacts import Artifact


class PruningPlan(Artifact):
    """Which level every module gets: heads for attention, columns for FFN, keyed ``LAYER.KIND``."""

    KIND: ClassVar[str] = "pruning_plan"

    speedup_target: float
    budget_ms: float  # for Σ modules, after the closed loop's corrections
    method: str
    sizes: dict[str, int]
    predicted_ms: float
    predicted_speedup: float
    search_loss: float | None = None  # distance to the dense model on the re-ranking examples; None: not searched
    seed_losses: dict[str, float] = Field(default_factory=dict)  # plan without search, uniform, … same examples
    evaluations: int = 0
