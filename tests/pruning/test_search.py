"""The search on synthetic losses where the best plan is known by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ziplm_deploy.pruning.allocations import uniform_plan
from ziplm_deploy.pruning.search.search import PlanSearch, measure_sensitivities
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.pruning.search.surrogate import Surrogate
from ziplm_deploy.recipe import SearchConfig

SIZES = (8, 6, 4, 2, 0)


def space(n_modules: int = 4, seed: int = 0) -> SearchSpace:
    rng = np.random.default_rng(seed)
    errors = tuple(np.concatenate([[0.0], np.sort(rng.uniform(0.01, 1.0, len(SIZES) - 1))]) for _ in range(n_modules))
    latency = tuple(np.array([0.1 + size * scale for size in SIZES]) for scale in rng.uniform(0.5, 2.0, n_modules))
    names = tuple(f"{i // 2}.{'attention' if i % 2 == 0 else 'ffn'}" for i in range(n_modules))
    return SearchSpace(names, (SIZES,) * n_modules, latency, errors)


class SensitivityLoss:
    """Errors times true sensitivities that the relative errors do not show, plus an interaction of neighbours."""

    def __init__(self, of: SearchSpace, seed: int = 1, interaction: float = 0.5) -> None:
        self.space, self.calls, self.interaction = of, 0, interaction
        self.sensitivity = 10 ** np.random.default_rng(seed).uniform(-2, 1, len(of.modules))

    def __call__(self, plan: Plan, above: float = np.inf) -> float:
        self.calls += 1
        damage = [w * e[s] for w, e, s in zip(self.sensitivity, self.space.errors, plan, strict=True)]
        pairs = sum(a * b for a, b in itertools.pairwise(damage))
        return float(sum(damage) + self.interaction * pairs)


def best_by_enumeration(of: SearchSpace, loss: SensitivityLoss, budget_ms: float) -> float:
    plans = itertools.product(range(len(SIZES)), repeat=len(of.modules))
    return min(loss(plan) for plan in plans if of.plan_ms(plan) <= budget_ms)


def search(of: SearchSpace, loss: SensitivityLoss, budget_ms: float, config: SearchConfig, seed: int = 0) -> tuple:
    curves = measure_sensitivities(of, loss, config.sensitivity_levels)
    run = PlanSearch(of, loss, budget_ms, seed)
    seeds = {
        "relative error": run.solve(of.errors),
        "measured": run.solve(curves),
        "uniform": uniform_plan(of, budget_ms),
    }
    return run.run(seeds, curves, config), seeds


@pytest.mark.parametrize("seed", range(6))
def test_the_result_fits_and_is_never_worse_than_a_seed(seed: int) -> None:
    of = space(6, seed)
    loss = SensitivityLoss(of, seed)
    budget_ms = 0.5 * of.plan_ms((0,) * 6)
    result, seeds = search(of, loss, budget_ms, SearchConfig(coefficient_steps=10, swap_evaluations=40), seed)
    assert of.plan_ms(result.plans[0]) <= budget_ms * (1 + 1e-9)
    assert loss(result.plans[0]) <= min(loss(plan) for plan in seeds.values()) + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_small_spaces_are_solved_within_five_percent_of_the_optimum(seed: int) -> None:
    of = space(4, seed)
    loss = SensitivityLoss(of, seed)
    budget_ms = 0.55 * of.plan_ms((0,) * 4)
    result, _ = search(of, loss, budget_ms, SearchConfig(coefficient_steps=30, swap_evaluations=120), seed)
    assert loss(result.plans[0]) <= 1.05 * best_by_enumeration(of, loss, budget_ms)


def test_measured_sensitivities_beat_relative_errors_when_those_mislead() -> None:
    of = space(6, 3)
    loss = SensitivityLoss(of, 5)
    budget_ms = 0.5 * of.plan_ms((0,) * 6)
    _, seeds = search(of, loss, budget_ms, SearchConfig(coefficient_steps=0, swap_evaluations=0))
    assert loss(seeds["measured"]) < loss(seeds["relative error"])


def test_sensitivity_curves_are_exact_where_measured_and_monotone() -> None:
    of = space(4, 2)
    loss = SensitivityLoss(of, 2)
    curves = measure_sensitivities(of, loss, n_levels=len(SIZES) - 1)
    for module, curve in enumerate(curves):
        np.testing.assert_allclose(curve, loss.sensitivity[module] * of.errors[module], rtol=1e-9)
    for curve in measure_sensitivities(of, loss, n_levels=1):
        assert curve[0] == 0
        assert (np.diff(curve) >= 0).all()


def test_the_surrogate_learns_weights_from_whole_plans() -> None:
    of = space(6, 1)
    truth = np.array([1.0, 3.0, 0.3, 1.0, 5.0, 0.5])
    surrogate = Surrogate([np.asarray(e) for e in of.errors], ridge=1e-6)
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(200):
        plan = tuple(int(s) for s in rng.integers(0, len(SIZES), 6))
        seen[plan] = float(sum(w * e[s] for w, e, s in zip(truth, of.errors, plan, strict=True)))
    surrogate.fit(seen)
    np.testing.assert_allclose(surrogate.weights, truth, rtol=0.05)


def test_growing_spends_the_budget_and_never_exceeds_it() -> None:
    of = space(5, 4)
    budget_ms = 0.6 * of.plan_ms((0,) * 5)
    run = PlanSearch(of, SensitivityLoss(of), budget_ms, seed=0)
    grown = run.grow((4,) * 5, Surrogate([np.asarray(e) for e in of.errors]))
    assert run.fits(grown)
    steps = [of.latency_ms[i][s - 1] - of.latency_ms[i][s] for i, s in enumerate(grown) if s > 0]
    assert all(of.plan_ms(grown) + extra > budget_ms for extra in steps)


def test_the_same_seed_gives_the_same_plan() -> None:
    of = space(6, 0)
    config = SearchConfig(coefficient_steps=10, swap_evaluations=30)
    first, _ = search(of, SensitivityLoss(of), 0.5 * of.plan_ms((0,) * 6), config, seed=7)
    second, _ = search(of, SensitivityLoss(of), 0.5 * of.plan_ms((0,) * 6), config, seed=7)
    assert first.plans == second.plans


def partly_dropped(n_modules: int = 6) -> SearchSpace:
    """Two modules of it were dropped before: their only level is 0."""
    of = space(n_modules)
    gone = (1, 4)

    def cut(levels: tuple, last: tuple) -> tuple:
        return tuple(last if i in gone else of_module for i, of_module in enumerate(levels))

    nothing = np.zeros(1)
    latency = cut(of.latency_ms, np.full(1, 0.1))
    return SearchSpace(of.modules, cut(of.sizes, (0,)), latency, cut(of.errors, nothing))


def test_modules_with_a_single_level_are_neither_measured_nor_moved() -> None:
    of = partly_dropped()
    loss = SensitivityLoss(of)
    curves = measure_sensitivities(of, loss, n_levels=2)
    assert loss.calls == 2 * 4
    assert [curves[i].tolist() for i in (1, 4)] == [[0.0], [0.0]]
    budget_ms = 0.5 * of.plan_ms((0,) * 6)
    result, seeds = search(of, loss, budget_ms, SearchConfig(coefficient_steps=10, swap_evaluations=40))
    assert loss(result.plans[0]) <= min(loss(plan) for plan in seeds.values()) + 1e-12
    assert all(plan[1] == plan[4] == 0 for plan in result.losses)
    assert of.plan_ms(result.plans[0]) <= budget_ms * (1 + 1e-9)


def test_a_space_of_one_plan_has_that_plan() -> None:
    of = SearchSpace(("0.attention", "0.ffn"), ((0,), (0,)), (np.full(1, 0.1),) * 2, (np.zeros(1),) * 2)
    result, _ = search(of, SensitivityLoss(of), 1.0, SearchConfig(coefficient_steps=3, swap_evaluations=3))
    assert result.plans == [(0, 0)]


def test_sizes_of_a_larger_model_become_what_is_there() -> None:
    of = partly_dropped()
    assert of.from_sizes({name: 64 for name in of.modules}) == (0,) * 6


def test_sizes_and_plans_convert_both_ways() -> None:
    of = space(4)
    plan = (0, 1, 2, 4)
    assert of.from_sizes(of.as_sizes(plan)) == plan
    assert of.from_sizes({name: 5 for name in of.modules}) == (2,) * 4  # the next smaller level
