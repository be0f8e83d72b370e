"""A pruning plan as a file: the size of every module, and what it is predicted to take and to lose."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.latency.statistics import Milliseconds
from ziplm_deploy.models.shape import ModuleId


class PruningPlan(Artifact):
    """Which level every module gets: heads for attention, columns for FFN, keyed ``LAYER.KIND``."""

    KIND: ClassVar[str] = "pruning_plan"

    speedup_target: float = Field(gt=0, allow_inf_nan=False)
    budget_ms: float = Field(allow_inf_nan=False)  # for Σ modules, after the closed loop's corrections
    method: str
    sizes: dict[str, Annotated[int, Field(ge=0)]]
    predicted_ms: Milliseconds
    predicted_speedup: float = Field(gt=0, allow_inf_nan=False)
    search_loss: float | None = None  # distance to the parent on the re-ranking examples; None: not searched
    seed_losses: dict[str, float] = Field(default_factory=dict)  # plan without search, uniform, … same examples
    evaluations: int = 0
    # of the structures kept in shrunk modules, those that the database would not keep; None: not decided in order
    exchanged_fraction: float | None = Field(None, ge=0, le=1, exclude_if=lambda fraction: fraction is None)

    @field_validator("sizes")
    @classmethod
    def _of_modules(cls, sizes: dict[str, int]) -> dict[str, int]:
        for name in sizes:
            ModuleId.parse(name)
        return sizes
