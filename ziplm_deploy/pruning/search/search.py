"""Which level every module gets: seeds, a surrogate that learns, level swaps, re-ranking.

The published search draws random coefficients for the modules' own relative errors. Those say little about the damage
to the task, so here the loss is *measured*: each module alone at a few levels first, then whole plans. A surrogate
(per-module weights on the measured curves, ridge-fitted to every plan seen) proposes through the DP; level swaps repair
what the surrogate cannot see. No plan is ever accepted that is worse than a seed, the uniform plan included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.kernels import spdy
from ziplm_deploy.pruning.search.space import Array, Plan, SearchSpace
from ziplm_deploy.pruning.search.surrogate import Surrogate
from ziplm_deploy.recipe import SearchConfig

# Loss of a plan on the search examples; may return inf as soon as it must exceed the second argument.
Loss = Callable[[Plan, float], float]


@dataclass
class SearchResult:
    """The best plans, best first, with what was seen on the way."""

    plans: list[Plan]
    losses: dict[Plan, float]
    seeds: dict[str, Plan] = field(default_factory=dict)
    evaluations: int = 0


def measure_sensitivities(
    space: SearchSpace, loss: Loss, n_levels: int, progress: StepProgress | None = None
) -> list[Array]:
    """Loss with one module at a level and the rest whole, for every level: measured at ``n_levels``, log-interpolated.

    Between measured levels the logarithm of the loss is interpolated over the logarithm of the relative error, which
    is close to linear; curves are made non-decreasing. One list entry a module, each [S_l].
    """
    curves = []
    for module, errors in enumerate(space.errors):
        last = len(errors) - 1
        points = sorted({max(1, round(last * (i + 1) / n_levels)) for i in range(n_levels)} & set(range(1, last + 1)))
        measured = []
        for level in points:
            plan = [0] * len(space.modules)
            plan[module] = level
            measured.append(max(loss(tuple(plan), np.inf), 1e-12))
        curves.append(_interpolate(errors, points, measured))
        if progress is not None:
            progress(module + 1, len(space.modules))
    return curves


def _interpolate(errors: Array, points: list[int], measured: list[float]) -> Array:
    if not points:
        return np.zeros(len(errors))
    x = np.log(np.maximum(errors, 1e-12))
    known_x, known_y = x[points], np.log(np.maximum.accumulate(np.array(measured)))
    y = np.interp(x, known_x, known_y)
    below = x < known_x[0]  # less pruned than the first measured level: loss proportional to the error
    y[below] = known_y[0] + (x[below] - known_x[0])
    curve = np.exp(y)
    curve[0] = 0.0
    return np.asarray(np.maximum.accumulate(curve))


class PlanSearch:
    """One search for one budget; holds every loss that was measured."""

    def __init__(self, space: SearchSpace, loss: Loss, budget_ms: float, seed: int) -> None:
        self.space = space
        self.budget_ms = budget_ms
        self.losses: dict[Plan, float] = {}
        self.evaluations = 0
        self._loss = loss
        self._rng = np.random.default_rng(seed)

    def fits(self, plan: Plan) -> bool:
        return self.space.plan_ms(plan) <= self.budget_ms * (1 + 1e-9)

    def evaluate(self, plan: Plan, above: float = np.inf) -> float:
        """Loss of a plan, measured once; ``inf`` as soon as it is certain to exceed ``above``."""
        if plan not in self.losses:
            self.losses[plan] = self._loss(plan, above)
            self.evaluations += 1
        return self.losses[plan]

    def solve(self, costs: Sequence[Array]) -> Plan:
        """The DP's plan; where only rounding to buckets makes the budget infeasible, the fastest plan."""
        try:
            return tuple(spdy.solve(self.space.latency_ms, costs, self.budget_ms))
        except spdy.InfeasibleBudgetError:
            fastest = tuple(int(np.argmin(levels)) for levels in self.space.latency_ms)
            if not self.fits(fastest):
                raise
            return fastest

    @property
    def best(self) -> tuple[Plan, float]:
        return min(self.losses.items(), key=lambda item: item[1])

    def grow(self, plan: Plan, surrogate: Surrogate, only: set[int] | None = None) -> Plan:
        """Spend what is left of the budget on the growth with the largest predicted gain a millisecond."""
        levels = list(plan)
        slack = self.budget_ms - self.space.plan_ms(plan)
        costs = surrogate.costs()
        while True:
            options = []
            for i, level in enumerate(levels):
                if level == 0 or (only is not None and i not in only):
                    continue
                extra = self.space.latency_ms[i][level - 1] - self.space.latency_ms[i][level]
                if extra <= slack:
                    gain = costs[i][level] - costs[i][level - 1]
                    options.append((gain / max(extra, 1e-9), i, extra))
            if not options:
                return tuple(levels)
            _, i, extra = max(options)
            levels[i] -= 1
            slack -= extra

    def propose_swap(self, plan: Plan, surrogate: Surrogate) -> Plan | None:
        """Best plan, by prediction, of a few random swaps: one or two modules some levels down, others up."""
        n_modules = len(plan)
        movable = [i for i, sizes in enumerate(self.space.sizes) if len(sizes) > 1]
        candidates = []
        for _ in range(6):
            levels = list(plan)
            down = self._rng.choice(movable, size=min(len(movable), int(self._rng.integers(1, 3))), replace=False)
            for i in down:
                levels[i] = min(levels[i] + int(self._rng.geometric(0.4)), len(self.space.sizes[i]) - 1)
            others = {i for i in range(n_modules) if i not in down}
            favoured = (
                set(self._rng.choice(sorted(others), size=max(1, len(others) // 3), replace=False)) if others else set()
            )
            grown = self.grow(self.grow(tuple(levels), surrogate, favoured), surrogate, others)
            if grown not in self.losses and self.fits(grown):
                candidates.append((surrogate.predict(grown), grown))
        return min(candidates)[1] if candidates else None

    def run(
        self,
        seeds: dict[str, Plan],
        curves: Sequence[Array],
        config: SearchConfig,
        progress: StepProgress | None = None,
    ) -> SearchResult:
        """Evaluate the seeds, then alternate surrogate proposals and swaps around the best plan."""
        surrogate = Surrogate(curves)
        for plan in seeds.values():
            self.evaluate(self.grow(plan, surrogate))
            self.evaluate(plan)
        total = self.evaluations + config.coefficient_steps + config.swap_evaluations
        share = config.coefficient_steps / max(config.coefficient_steps + config.swap_evaluations, 1)
        failures = 0
        while self.evaluations < total and failures < 40:
            if progress is not None:
                progress(self.evaluations, total)
            surrogate.fit(self.losses)
            proposal = self._proposal(surrogate, share)
            if proposal is None or proposal in self.losses:
                failures += 1
                continue
            failures = 0
            self.evaluate(proposal, above=1.5 * self.best[1])
        ranked = sorted((p for p in self.losses if self.fits(p)), key=self.losses.__getitem__)
        return SearchResult(ranked, dict(self.losses), seeds, self.evaluations)

    def _proposal(self, surrogate: Surrogate, share: float) -> Plan | None:
        if self._rng.random() < share:
            spread = self._rng.choice([0.0, 0.2, 0.5])
            noise = np.exp(spread * self._rng.standard_normal(len(self.space.modules)))
            return self.solve(surrogate.costs(noise))
        ranked = sorted(self.losses.items(), key=lambda item: item[1])[:3]
        start = ranked[min(int(self._rng.geometric(0.7)) - 1, len(ranked) - 1)][0]
        return self.propose_swap(start, surrogate)
