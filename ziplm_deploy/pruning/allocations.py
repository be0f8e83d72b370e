"""Plans without a search: which level every module gets within a latency budget.

All functions return a :data:`Plan` with ``Σ latency <= budget_ms``, and raise ``spdy.InfeasibleBudgetError`` where none
fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ziplm_deploy.models.shape import ModuleId
from ziplm_deploy.pruning.kernels.spdy import InfeasibleBudgetError
from ziplm_deploy.pruning.search.search import Loss
from ziplm_deploy.pruning.search.space import Plan, SearchSpace

FIRST_RATIO = 0.2  # of what the first layer loses over what the last one loses


def uniform_plan(space: SearchSpace, budget_ms: float) -> Plan:
    """Keep the same fraction of what every module has, the largest that fits; sizes are rounded down to a level."""
    fractions = {1.0, *(size / levels[0] for levels in space.sizes if levels[0] for size in levels)}
    return _first_fitting(space, budget_ms, (_keep_fraction(space, f) for f in sorted(fractions, reverse=True)))


def layer_drop_plan(space: SearchSpace, budget_ms: float) -> Plan:
    """Drop whole layers from the top, as few as fit; the other layers stay as they are."""
    layers = [ModuleId.parse(name).layer for name in space.modules]
    there = sorted({layer for layer, levels in zip(layers, space.sizes, strict=True) if levels[0]})
    candidates = (
        tuple(0 if layer in there[:n] else len(levels) - 1 for layer, levels in zip(layers, space.sizes, strict=True))
        for n in range(len(there), -1, -1)
    )
    return _first_fitting(space, budget_ms, candidates)


def greedy_drop_plan(space: SearchSpace, budget_ms: float, loss: Loss) -> Plan:
    """Drop whole modules, attention or FFN, each time the one whose loss is least, until the plan fits.

    ``loss``: of a plan; it may give up on one that exceeds its second argument, the least loss of the step so far.
    """
    plan: Plan = (0,) * len(space.sizes)
    left = [index for index, levels in enumerate(space.sizes) if levels[0] and levels[-1] == 0]
    while not _fits(space, plan, budget_ms):
        if not left:
            raise _infeasible(budget_ms)
        least, best, dropped = math.inf, left[0], plan
        for index in left:
            candidate = (*plan[:index], len(space.sizes[index]) - 1, *plan[index + 1 :])
            found = loss(candidate, least)
            if found < least or dropped == plan:
                least, best, dropped = found, index, candidate
        plan = dropped
        left.remove(best)
    return plan


def log_ratio_plan(space: SearchSpace, budget_ms: float) -> Plan:
    """Remove more of later layers: ``r_i = r_0 + (r_max − r_0) ln(1 + i) / ln n`` of layer i, in 0..n−1.

    ``r_0`` is a fifth of ``r_max``, as by default in the code of SlimGPT, and ``r_max`` the smallest that fits; sizes
    are rounded down to a level, and a ratio above 1 drops the module.
    """
    layers = [ModuleId.parse(name).layer for name in space.modules]
    weights = [_log_weight(layer, max(layers) + 1) for layer in layers]  # r_i / r_max
    ratios = {0.0} | {  # r_max at which some module reaches a level
        (1 - size / levels[0]) / weight
        for weight, levels in zip(weights, space.sizes, strict=True)
        if levels[0]
        for size in levels
    }
    plans = (
        tuple(
            _level_below(levels, (1 - r_max * weight) * levels[0] + 1e-9)
            for weight, levels in zip(weights, space.sizes, strict=True)
        )
        for r_max in sorted(ratios)
    )
    return _first_fitting(space, budget_ms, plans)


def _log_weight(layer: int, n_layers: int) -> float:
    if n_layers == 1:
        return 1.0
    return FIRST_RATIO + (1 - FIRST_RATIO) * math.log(1 + layer) / math.log(n_layers)


def random_plan(space: SearchSpace, budget_ms: float, seed: int = 0) -> Plan:
    """Take random modules one level down, one at a time, until the plan fits."""
    generator = np.random.default_rng(seed)
    plan = [0] * len(space.sizes)
    remaining = [index for index, levels in enumerate(space.sizes) if len(levels) > 1]
    while not _fits(space, tuple(plan), budget_ms):
        if not remaining:
            raise _infeasible(budget_ms)
        place = int(generator.integers(len(remaining)))
        index = remaining[place]
        plan[index] += 1
        if plan[index] == len(space.sizes[index]) - 1:
            remaining.pop(place)
    return tuple(plan)


def threshold_plan(space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor]) -> Plan:
    """Standardize scores within each module, then keep what lies above one global threshold (FLAP's allocation).

    ``scores``: importance of every structure [n], by module; not needed for modules that were dropped before. The
    threshold is the lowest that fits; sizes are rounded down to a level.
    """
    standard = [  # L × [n], ascending
        _standardized(scores[name]) if levels[0] else torch.zeros(0, dtype=torch.float64)
        for name, levels in zip(space.modules, space.sizes, strict=True)
    ]
    thresholds = torch.tensor(sorted(set(torch.cat(standard).tolist())), dtype=torch.float64)
    low, high = -1, len(thresholds) - 1  # -1: everything is kept

    def plan_at(index: int) -> Plan:
        if index < 0:
            return (0,) * len(standard)
        threshold = thresholds[index : index + 1]
        counts = [len(values) - int(torch.searchsorted(values, threshold, right=True)) for values in standard]
        return tuple(_level_below(levels, count) for levels, count in zip(space.sizes, counts, strict=True))

    if not _fits(space, plan_at(high), budget_ms):
        raise _infeasible(budget_ms)
    while low <= high:  # smaller levels are faster, so what fits is an upper range of thresholds
        middle = (low + high) // 2
        if _fits(space, plan_at(middle), budget_ms):
            high = middle - 1
        else:
            low = middle + 1
    return plan_at(low)


def _standardized(scores: Tensor) -> Tensor:
    """z-scores, ascending; zeros where all scores are equal."""
    spread = scores.std(correction=0)
    centred = scores - scores.mean()
    return (centred / spread if float(spread) > 0 else torch.zeros_like(centred)).sort().values


def _keep_fraction(space: SearchSpace, fraction: float) -> Plan:
    # the small addend undoes rounding in size / levels[0] * levels[0]
    return tuple(_level_below(levels, fraction * levels[0] + 1e-9) for levels in space.sizes)


def _level_below(levels: tuple[int, ...], size: float) -> int:
    """Index of the largest level not above ``size``; the smallest level if all are above."""
    return next((index for index, level in enumerate(levels) if level <= size), len(levels) - 1)


def _first_fitting(space: SearchSpace, budget_ms: float, plans: Iterable[Plan]) -> Plan:
    for plan in plans:
        if _fits(space, plan, budget_ms):
            return plan
    raise _infeasible(budget_ms)


def _fits(space: SearchSpace, plan: Plan, budget_ms: float) -> bool:
    return space.plan_ms(plan) <= budget_ms


def _infeasible(budget_ms: float) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(f"no plan of this method fits the budget of {budget_ms:.4g} ms; use method: ziplm")
