"""FinerCut: attention and feed-forward blocks leave one at a time, always the one whose absence changes least.

After Zhang et al. (2024): the change is that of the whole model's answers on calibration examples, measured here by
the task's own divergence. All other blocks stay as they are; nothing makes up for what is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ziplm_deploy.pruning.allocations import greedy_drop_plan
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.search import Loss
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class FinerCut(Method):
    title: ClassVar[str] = "whole blocks, the least harmful one first"
    measures: ClassVar[bool] = True

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return {}, 0.0

    def level_sizes(self, sizes: Sequence[int], n: int) -> list[int]:
        return [n, 0] if n else [0]

    def measured_plan(self, space: SearchSpace, budget_ms: float, loss: Loss) -> Plan:
        return greedy_drop_plan(space, budget_ms, loss)


METHOD = FinerCut()
