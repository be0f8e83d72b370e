"""Magnitude: what has the smallest Frobenius norm goes first, by one threshold over all modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ziplm_deploy.pruning.allocations import threshold_plan
from ziplm_deploy.pruning.compensations import masked_levels
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class Magnitude(Method):
    title: ClassVar[str] = "norms, one threshold"

    def scores(self, linear: OutputLinear, seed: int) -> Tensor:
        """‖W_M‖ (Frobenius)."""
        column_power = linear.weight.square().sum(0)  # [d]
        return column_power.reshape(linear.n_structures, linear.group_size).sum(1).sqrt()

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return masked_levels(linear, self.scores(linear, seed), sizes, moves_mean=False), 0.0

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return threshold_plan(space, budget_ms, scores)


METHOD = Magnitude()
