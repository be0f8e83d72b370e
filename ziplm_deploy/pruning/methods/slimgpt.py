"""SlimGPT: OBS in rounds instead of steps, later layers more than earlier ones (after Ling et al., NeurIPS 2024).

Heads leave one at a time, by the diagonal of their Cholesky factor; FFN columns leave in rounds that become smaller.
Layers are pruned in order, each on what the pruned ones before it give: then a module has one size, and rounds are
sized for it as published. Levels of the database, from which only milliseconds are read, share the rounds of the
smallest one. Beside the authors' rules stand this project's: latency instead of parameters as the budget,
and a bias that takes over the mean of what is removed unless ``prune.centred`` is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ziplm_deploy.pruning.allocations import log_ratio_plan
from ziplm_deploy.pruning.compensations import obs_levels
from ziplm_deploy.pruning.kernels.batched_obs import batched_order, round_sizes
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class Slimgpt(Method):
    title: ClassVar[str] = "OBS in rounds, ratios that grow with the layer, in order"
    in_order: ClassVar[bool] = True

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return obs_levels(linear, sizes, prune, order_of=_order)

    def moves_mean_to_bias(self, prune: PruneConfig) -> bool:
        return prune.centred

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return log_ratio_plan(space, budget_ms)


def _order(H: Tensor, W: Tensor, group_size: int, least: int) -> Tensor:
    leave = H.shape[0] // group_size - least
    rounds = round_sizes(leave) if group_size == 1 else [1] * leave
    return batched_order(H, W, group_size, rounds)[0]


METHOD = Slimgpt()
