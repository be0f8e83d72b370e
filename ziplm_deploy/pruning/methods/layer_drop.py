"""Layer drop: whole layers from the top, all others as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ziplm_deploy.pruning.allocations import layer_drop_plan
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig


class LayerDrop(Method):
    title: ClassVar[str] = "whole layers from the top"

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return {}, 0.0

    def level_sizes(self, sizes: Sequence[int], n: int) -> list[int]:
        return [n, 0] if n else [0]

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return layer_drop_plan(space, budget_ms)


METHOD = LayerDrop()
