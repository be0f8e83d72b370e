"""Random: structures and plans by chance, for what a method has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ziplm_deploy.pruning.allocations import random_plan
from ziplm_deploy.pruning.compensations import masked_levels
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class Random(Method):
    title: ClassVar[str] = "by chance"

    def scores(self, linear: OutputLinear, seed: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(linear.n_structures, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return masked_levels(linear, self.scores(linear, seed), sizes, moves_mean=False), 0.0

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return random_plan(space, budget_ms, seed)


METHOD = Random()
