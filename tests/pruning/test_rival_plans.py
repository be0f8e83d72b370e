"""Plans by a logarithm of the layer and by greedy dropping, against plain enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tests.helpers.levels import levels_of
from ziplm_deploy.pruning.allocations import greedy_drop_plan, log_ratio_plan
from ziplm_deploy.pruning.kernels import obs
from ziplm_deploy.pruning.kernels.batched_obs import batched_order, round_sizes
from ziplm_deploy.pruning.kernels.spdy import InfeasibleBudgetError
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.search.space import Plan, SearchSpace

WIDTHS, HEADS = tuple(range(64, -1, -2)), (4, 3, 2, 1, 0)


def make_space(layers: int) -> SearchSpace:
    names = tuple(f"{i}.{kind}" for i in range(layers) for kind in ("attention", "ffn"))
    sizes = (HEADS, WIDTHS) * layers
    return SearchSpace(names, sizes, *(tuple(np.linspace(*ends, len(s)) for s in sizes) for ends in ((2, 0.1), (0, 1))))


def ends(space: SearchSpace) -> tuple[float, float]:
    """Milliseconds of the fastest and of the slowest plan."""
    return space.plan_ms(space.fastest()), space.plan_ms((0,) * len(space.sizes))


def ratio_plan(space: SearchSpace, r_0: float, r_max: float, n: int) -> Plan:
    """Straight from the formula."""
    plan = []
    for name, levels in zip(space.modules, space.sizes, strict=True):
        i = int(name.split(".")[0])
        ratio = min(1.0, r_0 + (r_max - r_0) * math.log(1 + i) / math.log(n))
        plan.append(next(k for k, size in enumerate(levels) if size <= (1 - ratio) * levels[0] + 1e-9))
    return tuple(plan)


@pytest.mark.parametrize("layers", [2, 5, 12])
def test_ratios_grow_with_the_logarithm_of_the_layer(layers: int) -> None:
    space = make_space(layers)
    fastest, slowest = ends(space)
    for budget_ms in np.linspace(fastest + 1e-9, slowest - 1e-6, 9):
        plan = log_ratio_plan(space, budget_ms)
        assert space.plan_ms(plan) <= budget_ms
        kept = [space.sizes[i][level] for i, level in enumerate(plan)]
        assert all(np.diff(kept[::2]) <= 0)
        assert all(np.diff(kept[1::2]) <= 0)
        low, high = -1e-9, 5.0  # a larger ratio is never slower
        while high - low > 1e-6:
            middle = (low + high) / 2
            fits = space.plan_ms(ratio_plan(space, middle / 5, middle, layers)) <= budget_ms
            low, high = (low, middle) if fits else (middle, high)
        assert plan == ratio_plan(space, high / 5, high, layers)


def test_the_first_layer_loses_a_fifth_of_what_the_last_one_loses() -> None:
    space = make_space(8)
    plan = log_ratio_plan(space, 0.8 * ends(space)[1])
    lost = [1 - space.sizes[i][plan[i]] / 64 for i in (1, 15)]
    assert lost[0] == pytest.approx(lost[1] / 5, abs=2 / 64)


def test_one_layer_has_one_ratio() -> None:
    space = make_space(1)
    sizes = space.as_sizes(log_ratio_plan(space, 2.5))
    assert sizes["0.ffn"] / 64 == pytest.approx(sizes["0.attention"] / 4, abs=0.25)


def test_a_module_that_is_gone_has_no_ratio() -> None:
    space = SearchSpace(
        ("0.attention", "0.ffn", "1.attention", "1.ffn"),
        ((0,), (64, 32, 0), (0,), (16, 8, 0)),
        (np.array([0.1]), np.array([4.0, 2.0, 0.1]), np.array([0.1]), np.array([2.0, 1.0, 0.1])),
        (np.zeros(1), np.array([0, 0.5, 1]), np.zeros(1), np.array([0, 0.5, 1])),
    )
    assert space.as_sizes(log_ratio_plan(space, 5.3))["1.ffn"] == 8
    assert log_ratio_plan(space, 6.3) == (0, 0, 0, 0)
    with pytest.raises(InfeasibleBudgetError):
        log_ratio_plan(space, 0.3)


class Damage:
    """Loss of dropped modules: their own damage, and more for neighbours that are both gone."""

    def __init__(self, n: int, seed: int) -> None:
        self.own = np.random.default_rng(seed).uniform(0.1, 1, n)
        self.asked: list[tuple[Plan, float]] = []

    def __call__(self, plan: Plan, above: float = math.inf) -> float:
        self.asked.append((plan, above))
        gone = [int(level > 0) for level in plan]
        total = float(self.own @ gone) + 0.7 * sum(a * b for a, b in itertools.pairwise(gone))
        return math.inf if total > above else total


@pytest.mark.parametrize("seed", range(4))
def test_the_least_harmful_block_goes_first(seed: int) -> None:
    space, damage = make_space(4), Damage(8, seed)
    fastest, slowest = ends(space)
    for budget_ms in np.linspace(fastest + 1e-9, slowest - 1e-6, 9):
        plan = greedy_drop_plan(space, budget_ms, damage)
        gone: list[int] = []
        dropped: Plan = (0,) * 8
        while space.plan_ms(dropped) > budget_ms:
            candidates = {
                i: tuple(len(space.sizes[k]) - 1 if k in (*gone, i) else 0 for k in range(8)) for i in range(8)
            }
            best = min((i for i in range(8) if i not in gone), key=lambda i: damage(candidates[i]))
            gone, dropped = [*gone, best], candidates[best]
        assert plan == dropped


def test_losses_are_asked_for_no_further_than_the_least() -> None:
    space, damage = make_space(3), Damage(6, 0)
    greedy_drop_plan(space, ends(space)[1] - 1e-6, damage)
    least = math.inf
    assert len(damage.asked) == 6
    for plan, above in damage.asked:
        assert above == least
        least = min(least, float(damage.own[[level > 0 for level in plan]].sum()))


def test_a_loss_of_infinity_still_drops_a_block() -> None:
    space = make_space(2)
    plan = greedy_drop_plan(space, ends(space)[0] + 1e-9, lambda plan, above: math.inf)
    assert space.as_sizes(plan) == dict.fromkeys(space.modules, 0)
    with pytest.raises(InfeasibleBudgetError):
        greedy_drop_plan(space, ends(space)[0] - 1e-6, lambda plan, above: 0.0)


def correlated(d: int, seed: int = 0) -> tuple[torch.Tensor, InputMoments]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d, d, generator=generator).double() @ torch.randn(d, 5 * d, generator=generator).double()
    W = torch.randn(6, d, generator=generator).double()
    return W, InputMoments(X @ X.T / X.shape[1], X.mean(1), X.shape[1])


@pytest.mark.parametrize(("group_size", "size"), [(1, 20), (1, 130), (4, 9)])
def test_a_single_level_of_slimgpt_has_rounds_of_its_own(group_size: int, size: int) -> None:
    W, moments = correlated(160)
    level = levels_of((W, None, moments), [size], method="slimgpt", group_size=group_size, centred=False)[size]
    H = obs.damp(moments.hessian, 0.01)[0]
    leave = 160 // group_size - size
    rounds = round_sizes(leave) if group_size == 1 else [1] * leave
    order, _ = batched_order(H, W, group_size, rounds)
    kept = order[leave:]
    assert level.kept.tolist() == kept.tolist()
    columns = (kept[:, None] * group_size + torch.arange(group_size)).flatten()
    best = W @ H[:, columns] @ torch.linalg.inv(H[columns][:, columns])
    torch.testing.assert_close(level.weight.double(), best, rtol=1e-4, atol=1e-5)


def test_levels_of_slimgpt_are_nested() -> None:
    W, moments = correlated(160)
    levels = levels_of((W, None, moments), [160, 120, 64, 10, 0], method="slimgpt")
    kept = [set(level.kept.tolist()) for level in levels.values()]
    assert all(smaller < larger for larger, smaller in itertools.pairwise(kept))
