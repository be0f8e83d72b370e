"""The DP against enumeration, its guarantee, its bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziplm_deploy.pruning.kernels import spdy


def random_problem(rng: np.random.Generator, n_modules: int, n_levels: int) -> tuple[list, list]:
    t = [np.sort(rng.uniform(0.1, 10.0, n_levels))[::-1].copy() for _ in range(n_modules)]
    e = [np.sort(rng.uniform(0.0, 1.0, n_levels)) for _ in range(n_modules)]
    return t, e


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n_modules=st.integers(1, 5), n_levels=st.integers(1, 5))
def test_dp_is_as_good_as_enumeration_of_the_bucketed_problem(seed: int, n_modules: int, n_levels: int) -> None:
    rng = np.random.default_rng(seed)
    t, e = random_problem(rng, n_modules, n_levels)
    fastest, slowest = sum(x.min() for x in t), sum(x.max() for x in t)
    B = fastest + rng.uniform(0.05, 1.0) * (slowest - fastest) + 0.05
    K = 400
    delta = B / K
    costs = {
        plan: sum(e[i][s] for i, s in enumerate(plan))
        for plan in itertools.product(range(n_levels), repeat=n_modules)
        if sum(np.ceil(t[i][s] / delta - 1e-9) for i, s in enumerate(plan)) <= K
    }
    if not costs:
        with pytest.raises(spdy.InfeasibleBudgetError):
            spdy.solve(t, e, B, K)
        return
    plan = spdy.solve(t, e, B, K)
    assert sum(e[i][s] for i, s in enumerate(plan)) == pytest.approx(min(costs.values()), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_budget_is_never_exceeded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t, e = random_problem(rng, 24, 12)
    B = float(rng.uniform(1.05, 3.0) * sum(x.min() for x in t))
    plan = spdy.solve(t, e, B)
    assert sum(t[i][s] for i, s in enumerate(plan)) <= B * (1 + 1e-9)


def test_a_loose_budget_keeps_the_dense_model() -> None:
    t, e = random_problem(np.random.default_rng(0), 6, 4)
    assert spdy.solve(t, e, 1.01 * sum(x.max() for x in t)) == [0] * 6


def test_infeasible_budgets_raise() -> None:
    t, e = random_problem(np.random.default_rng(0), 3, 3)
    for B in (0.99 * sum(x.min() for x in t), 0.0, -1.0):
        with pytest.raises(spdy.InfeasibleBudgetError):
            spdy.solve(t, e, B)
