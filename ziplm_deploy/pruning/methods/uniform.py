"""Uniform: the weights of ZipLM, and the same fraction of every module instead of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ziplm_deploy.pruning.allocations import uniform_plan
from ziplm_deploy.pruning.methods.ziplm import Ziplm
from ziplm_deploy.pruning.search.space import Plan, SearchSpace


class Uniform(Ziplm):
    title: ClassVar[str] = "OBS, the same fraction of every module"
    searches: ClassVar[bool] = False

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        return uniform_plan(space, budget_ms)


METHOD = Uniform()
