"""ZipLM: OBS for order and weights, a search over measured losses and milliseconds for the plan (ALGORITHM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ziplm_deploy.pruning.compensations import obs_levels
from ziplm_deploy.pruning.methods.base import Levels, Method, OutputLinear
from ziplm_deploy.recipe import PruneConfig


class Ziplm(Method):
    title: ClassVar[str] = "OBS, searched against measured latency"
    refits: ClassVar[bool] = True
    searches: ClassVar[bool] = True

    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        return obs_levels(linear, sizes, prune)

    def moves_mean_to_bias(self, prune: PruneConfig) -> bool:
        return prune.centred


METHOD = Ziplm()
