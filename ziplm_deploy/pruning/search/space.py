"""What a plan chooses from: the levels of every module, with milliseconds and relative error of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ziplm_deploy.pruning.kernels import spdy

Array = spdy.Array
Plan = tuple[int, ...]  # index of the level, one a module; 0 = as it is now


@dataclass(frozen=True)
class SearchSpace:
    """Levels of all modules: descending sizes, their milliseconds, their relative errors."""

    modules: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]  # L × [S_l], first is what the module has now
    latency_ms: tuple[Array, ...]  # L × [S_l]
    errors: tuple[Array, ...]  # L × [S_l], first is 0

    def plan_ms(self, plan: Plan) -> float:
        return sum(float(levels[s]) for levels, s in zip(self.latency_ms, plan, strict=True))

    def fastest(self) -> Plan:
        """The plan that takes the fastest level everywhere."""
        return tuple(int(np.argmin(levels)) for levels in self.latency_ms)

    def as_sizes(self, plan: Plan) -> dict[str, int]:
        return {name: self.sizes[i][plan[i]] for i, name in enumerate(self.modules)}

    def from_sizes(self, sizes: dict[str, int]) -> Plan:
        """The plan with these sizes; one that is no level becomes the next smaller level."""
        return tuple(
            next(s for s, size in enumerate(self.sizes[i]) if size <= sizes[name])
            for i, name in enumerate(self.modules)
        )
