"""FLAP: what varies little goes first, and its mean output goes to the bias (after An et al., AAAI 2024).

Scores are summed over the columns of a head, where the authors standardize columns first and average then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ziplm_deploy.pruning.allocations import threshold_plan
from ziplm_deploy.pruning.compensations import masked_levels
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class Flap(Method):
    title: ClassVar[str] = "fluctuation, one threshold, bias compensated"

    def scores(self, linear: OutputLinear, seed: int) -> Tensor:
        """Σ_{j∈M} Var(x_j)·‖W_:j‖² (ALGORITHM, cheap baselines)."""
        variance = (linear.moments.hessian.diagonal() - linear.moments.mean.square()).clamp(min=0)
        column_power = linear.weight.square().sum(0)  # [d]
        return (variance * column_power).reshape(linear.n_structures, linear.group_size).sum(1)

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return masked_levels(linear, self.scores(linear, seed), sizes, moves_mean=True), 0.0

    def moves_mean_to_bias(self, prune: PruneConfig) -> bool:
        return True

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return threshold_plan(space, budget_ms, scores)


METHOD = Flap()
