"""Wanda-sp: weights times the size of their inputs, the same fraction of every module, no compensation.

After Wanda (Sun et al., ICLR 2024) as FLAP (An et al., AAAI 2024) took it to structures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ziplm_deploy.pruning.allocations import uniform_plan
from ziplm_deploy.pruning.compensations import masked_levels
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class WandaSp(Method):
    title: ClassVar[str] = "weights times inputs, the same fraction of every module"

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return masked_levels(linear, _weights_times_inputs(linear), sizes, moves_mean=False), 0.0

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return uniform_plan(space, budget_ms)


def _weights_times_inputs(linear: OutputLinear) -> Tensor:
    """Σ_{j∈M} mean_i |W_ij| · √H_jj, float64 [n]."""
    size = linear.weight.abs().mean(0) * linear.moments.hessian.diagonal().clamp(min=0).sqrt()  # [d]
    return size.reshape(linear.n_structures, linear.group_size).sum(1)


METHOD = WandaSp()
