"""The section ``prune``: the method, its settings, and the search for the best plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ziplm_deploy.recipe.base import Frozen
from ziplm_deploy.recipe.choices import page_names

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[page_names("pruning", "methods")]


class SearchConfig(Frozen):
    """Effort of the search for the best plan."""

    n_sequences: int = Field(96, ge=8, description="Calibration examples on which candidate plans are compared.")
    context: int | None = Field(
        None,
        ge=8,
        le=8192,
        exclude_if=lambda context: context is None,
        description="Text-generation: tokens of these examples, the first of a window; default: `data.context`. An "
        "evaluated plan costs a pass over all of them.",
    )
    n_rerank: int = Field(256, ge=8, description="Examples on which the best candidates are compared again.")
    sensitivity_levels: int = Field(
        4,
        ge=0,
        le=16,
        description="Levels a module at which the loss is measured before the search; decides most. 0: none, the loss "
        "is estimated from `prune.fisher`.",
    )
    coefficient_steps: int = Field(20, ge=0, description="Plans proposed by the surrogate, its weights perturbed.")
    swap_evaluations: int = Field(100, ge=0, description="Plans tried by swaps of levels around the best plan.")


class PruneConfig(Frozen):
    """What is pruned by which method, and within which memory."""

    method: MethodName = Field("ziplm", description="`ziplm`, or a baseline behind the same interface.")
    damping: float = Field(
        0.01, gt=0, le=1.0, description="Hessian damping, relative to its mean diagonal; more when tokens are few."
    )
    centred: bool = Field(True, description="Centred Hessian: weights and bias are compensated jointly.")
    fisher: bool = Field(
        False,
        exclude_if=lambda fisher: not fisher,
        description="Weigh what leaves a module's output by the Fisher information of the task's loss there, from one "
        "backward pass over calibration examples; otherwise every direction of an output counts alike.",
    )
    reconstruct: bool = Field(
        True, description="After the search, refit kept weights to the dense residual stream, layer by layer."
    )
    in_order: bool = Field(
        False,
        exclude_if=lambda in_order: not in_order,
        description="Once sizes are fixed, decide structures and weights anew, layer by layer, on what the pruned "
        "layers before give; costs about two passes over the calibration data and the OBS of one level a module.",
    )
    memory_limit_gb: float = Field(
        8.0, gt=0, description="Limit for Hessians; layers stream under it, and levels to the disk."
    )
    search: SearchConfig = Field(default_factory=SearchConfig, description="Search over level assignments.")

    @model_validator(mode="after")
    def _check_fisher(self) -> PruneConfig:
        if self.fisher and self.method != "ziplm":
            raise ValueError(
                f"expected method ziplm beside fisher, found {self.method}, whose order does not come from errors; "
                "leave fisher out"
            )
        if not self.fisher and not self.search.sensitivity_levels:
            instead = (
                "or set fisher: true, from which losses are estimated" if self.method == "ziplm" else "leave it out"
            )
            raise ValueError(f"expected search.sensitivity_levels of 1 or more, found 0; {instead}")
        return self
