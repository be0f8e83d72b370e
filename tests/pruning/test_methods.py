"""Baselines: what they keep, and plans that fit their budget and nothing smaller than they must."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.levels import levels_of
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.pruning.allocations import layer_drop_plan, random_plan, threshold_plan, uniform_plan
from ziplm_deploy.pruning.kernels.spdy import InfeasibleBudgetError
from ziplm_deploy.pruning.methods import METHODS, OutputLinear, get_method
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import MethodName, PruneConfig

BASELINES: tuple[MethodName, ...] = ("uniform", "layer-drop", "random", "magnitude", "flap", "slimgpt", "wanda-sp")
MEASURED: tuple[MethodName, ...] = ("finer-cut",)


def plan_of(
    method: MethodName, space: SearchSpace, budget_ms: float, scores: Mapping[str, torch.Tensor], seed: int = 0
) -> Plan:
    return get_method(method).plan(space, budget_ms, scores, seed)


def scores_of(method: MethodName, W: torch.Tensor, moments: InputMoments, group_size: int = 1) -> torch.Tensor | None:
    return get_method(method).scores(OutputLinear.of(W, None, moments, group_size), seed=0)


def simple_stats(variances: list[float], means: list[float] | None = None) -> InputMoments:
    mean = torch.tensor(means or [0.0] * len(variances), dtype=torch.float64)
    return InputMoments(torch.diag(torch.tensor(variances).double()) + torch.outer(mean, mean), mean, 100)


def test_magnitude_keeps_the_largest_columns() -> None:
    W = torch.tensor([[3.0, -5.0, 1.0, 4.0]]).double()
    levels = levels_of((W, None, simple_stats([1, 1, 100, 1])), range(5), method="magnitude")
    assert [level.kept.tolist() for level in levels.values()] == [[0, 1, 2, 3], [0, 1, 3], [1, 3], [1], []]
    assert levels[2].weight.tolist() == [[-5, 4]]
    assert levels[2].relative_error == pytest.approx((9 + 100) / (9 + 25 + 100 + 16))


def test_magnitude_of_a_group_is_its_norm() -> None:
    W = torch.tensor([[3.0, 3.0, 4.0, 0.0]]).double()
    scores = scores_of("magnitude", W, simple_stats([1] * 4), 2)
    assert scores is not None
    torch.testing.assert_close(scores, torch.tensor([18.0, 16.0]).double().sqrt())


def test_flap_weighs_by_variance_and_moves_the_mean_to_the_bias() -> None:
    W = torch.tensor([[1.0, 2.0, 3.0]]).double()
    stats = simple_stats([9.0, 1.0, 0.25], means=[1.0, 2.0, 10.0])
    scores = scores_of("flap", W, stats)
    assert scores is not None
    torch.testing.assert_close(scores, torch.tensor([9.0, 4.0, 2.25]).double())
    level = levels_of((W, torch.ones(1), stats), [1], method="flap")[1]
    assert level.kept.tolist() == [0]
    assert level.bias.tolist() == [1 + 2 * 2 + 3 * 10]


def test_wanda_weighs_by_the_size_of_inputs_and_moves_nothing() -> None:
    W = torch.tensor([[1.0, -4.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0]]).double()
    stats = simple_stats([3.0, 1.0, 16.0, 0.0], means=[1.0, 0.0, 3.0, 0.5])  # sizes 2, 1, 5, 0.5
    level = levels_of((W, torch.ones(2), stats), [2], method="wanda-sp")[2]  # 4, 2, 5, 0.5
    assert level.kept.tolist() == [0, 2]
    assert level.weight.tolist() == [[1, 1], [3, 1]]
    assert level.bias.tolist() == [1, 1]
    assert levels_of((W, None, stats), [1], method="wanda-sp", group_size=2)[1].kept.tolist() == [0]  # 6 and 5.5


def test_random_depends_on_the_seed_only() -> None:
    W, stats = torch.ones(2, 20).double(), simple_stats([1.0] * 20)
    first, again, other = (levels_of((W, None, stats), [7], method="random", seed=s)[7].kept for s in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RecipeError, match="magnitude, random, slimgpt, uniform, wanda-sp, ziplm"):
        get_method("taylor")


def test_every_page_is_a_method_that_recipes_know() -> None:
    assert set(METHODS) == {"ziplm", *BASELINES, *MEASURED}
    assert [method for method in METHODS if get_method(method).searches] == ["ziplm"]
    assert [method for method in METHODS if get_method(method).refits] == ["uniform", "ziplm"]
    assert [method for method in METHODS if get_method(method).measures] == list(MEASURED)
    assert [method for method in METHODS if get_method(method).in_order] == ["slimgpt"]
    for method in METHODS:
        assert PruneConfig(method=method).method == method
        assert get_method(method).title


def test_only_methods_that_plan_by_a_threshold_or_by_chance_keep_scores() -> None:
    scores = {method: scores_of(method, torch.ones(2, 4), simple_stats([1.0] * 4), 2) for method in METHODS}
    assert {method for method, values in scores.items() if values is not None} == {"magnitude", "flap", "random"}


def make_space(layers: int = 3, seed: int = 0) -> SearchSpace:
    """Heads 4..0 and widths 64..0 with latencies that fall strictly, errors that rise."""
    generator = np.random.default_rng(seed)
    sizes: dict[str, tuple[int, ...]] = {"attention": (4, 3, 2, 1, 0), "ffn": (64, 48, 32, 16, 8, 0)}
    latency = {k: np.cumsum(generator.uniform(0.1, 1.0, len(v)))[::-1] for k, v in sizes.items()}
    names = tuple(f"{i}.{kind}" for i in range(layers) for kind in sizes)
    kinds = [name.split(".")[1] for name in names]
    return SearchSpace(
        modules=names,
        sizes=tuple(sizes[k] for k in kinds),
        latency_ms=tuple(latency[k] for k in kinds),
        errors=tuple(np.linspace(0, 1, len(sizes[k])) for k in kinds),
    )


def make_scores(space: SearchSpace, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(levels[0], generator=generator).double() * 10**i
        for i, (name, levels) in enumerate(zip(space.modules, space.sizes, strict=True))
    }


def level_at(levels: tuple[int, ...], fraction: float) -> int:
    return next(index for index, size in enumerate(levels) if size <= fraction * levels[0])


def slowest(space: SearchSpace) -> float:
    return space.plan_ms((0,) * len(space.sizes))


def fastest(space: SearchSpace) -> float:
    return space.plan_ms(tuple(len(levels) - 1 for levels in space.sizes))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BASELINES), st.floats(0, 1), st.integers(1, 4), st.integers(0, 99))
def test_every_plan_fits_its_budget(method: MethodName, share: float, layers: int, seed: int) -> None:
    space = make_space(layers, seed)
    budget_ms = fastest(space) + share * (slowest(space) - fastest(space)) + 1e-9
    plan = plan_of(method, space, budget_ms, make_scores(space, seed), seed)
    assert space.plan_ms(plan) <= budget_ms
    assert space.from_sizes(space.as_sizes(plan)) == plan


@pytest.mark.parametrize("method", BASELINES)
def test_a_generous_budget_keeps_everything(method: MethodName) -> None:
    space = make_space()
    plan = plan_of(method, space, slowest(space), make_scores(space))
    assert plan == (0,) * len(plan)


@pytest.mark.parametrize("method", BASELINES)
def test_an_impossible_budget_is_an_error(method: MethodName) -> None:
    space = make_space()
    with pytest.raises(InfeasibleBudgetError, match="ms"):
        plan_of(method, space, fastest(space) - 1e-6, make_scores(space))


def test_each_method_plans_in_its_own_way() -> None:
    for method in ("ziplm", "finer-cut"):
        with pytest.raises(NotImplementedError, match="search"):
            plan_of(method, make_space(), 1.0, {})
    with pytest.raises(NotImplementedError, match="losses"):
        get_method("uniform").measured_plan(make_space(), 1.0, lambda plan, above: 0.0)


def test_uniform_keeps_one_fraction_the_largest_that_fits() -> None:
    space = make_space()
    for budget_ms in np.linspace(fastest(space) + 1e-9, slowest(space), 23):
        sizes = space.as_sizes(uniform_plan(space, budget_ms))
        assert len({size for name, size in sizes.items() if "ffn" in name}) == 1
        assert len({size for name, size in sizes.items() if "attention" in name}) == 1
        by_brute_force = max(
            total
            for f in np.linspace(0, 1, 4 * 64 + 1)
            for total in [space.plan_ms(tuple(level_at(levels, f) for levels in space.sizes))]
            if total <= budget_ms
        )
        assert space.plan_ms(space.from_sizes(sizes)) == pytest.approx(by_brute_force)


def test_layer_drop_takes_whole_layers_from_the_top() -> None:
    space = make_space()
    whole = slowest(space) - fastest(space)
    plan = layer_drop_plan(space, fastest(space) + whole * 0.4)
    sizes = space.as_sizes(plan)
    assert sizes == {"0.attention": 4, "0.ffn": 64, "1.attention": 0, "1.ffn": 0, "2.attention": 0, "2.ffn": 0}


def shrunk_space() -> SearchSpace:
    """Layer 1 of three is gone, layer 0 lost its FFN, layer 2 has fewer structures."""
    space = make_space()
    now = {"0.ffn": 0, "1.attention": 0, "1.ffn": 0, "2.attention": 2, "2.ffn": 32}
    start = [space.sizes[i].index(now.get(name, space.sizes[i][0])) for i, name in enumerate(space.modules)]
    sizes = tuple(levels[s:] for levels, s in zip(space.sizes, start, strict=True))
    latency = tuple(levels[s:] for levels, s in zip(space.latency_ms, start, strict=True))
    return SearchSpace(space.modules, sizes, latency, tuple(np.linspace(0, 1, len(levels)) for levels in sizes))


@pytest.mark.parametrize("method", BASELINES)
def test_plans_of_a_shrunk_model_fit_and_keep_all_if_they_may(method: MethodName) -> None:
    space = shrunk_space()
    scores = {name: s for name, s in make_scores(space).items() if len(s)}  # none for dropped modules
    for budget_ms in np.linspace(fastest(space) + 1e-9, slowest(space) + 1e-9, 11):
        plan = plan_of(method, space, budget_ms, scores)
        assert space.plan_ms(plan) <= budget_ms
        assert space.from_sizes(space.as_sizes(plan)) == plan
    assert plan == (0,) * 6
    with pytest.raises(InfeasibleBudgetError):
        plan_of(method, space, fastest(space) - 1e-6, scores)


@pytest.mark.parametrize("method", BASELINES)
def test_a_model_with_nothing_left_has_one_plan(method: MethodName) -> None:
    space = SearchSpace(("0.attention", "0.ffn"), ((0,), (0,)), (np.full(1, 0.1),) * 2, (np.zeros(1),) * 2)
    assert plan_of(method, space, 0.3, {}) == (0, 0)
    with pytest.raises(InfeasibleBudgetError):
        plan_of(method, space, 0.1, {})


def test_layer_drop_counts_only_the_layers_that_are_left() -> None:
    space = shrunk_space()
    without_last = space.as_sizes((0,) * 6) | {"2.attention": 0, "2.ffn": 0}
    budget_ms = space.plan_ms(space.from_sizes(without_last)) + 1e-9
    assert space.as_sizes(layer_drop_plan(space, budget_ms)) == without_last
    nothing = space.as_sizes(layer_drop_plan(space, budget_ms - 1e-6))
    assert set(nothing.values()) == {0}


def test_threshold_plan_is_the_lowest_threshold_that_fits() -> None:
    space = make_space(2)
    scores = make_scores(space)
    standard = {name: (s - s.mean()) / s.std(correction=0) for name, s in scores.items()}
    thresholds = torch.cat(list(standard.values())).sort().values
    for budget_ms in np.linspace(fastest(space) + 1e-9, slowest(space), 17):
        plan = threshold_plan(space, budget_ms, scores)
        candidates = (
            space.from_sizes({name: int((z > t).sum()) for name, z in standard.items()})
            for t in itertools.chain([-torch.inf], thresholds)
        )
        assert plan == next(p for p in candidates if space.plan_ms(p) <= budget_ms)


def test_equal_scores_and_scale_do_not_matter_to_the_threshold() -> None:
    space = make_space(2)
    scores = make_scores(space)
    budget_ms = 0.6 * slowest(space)
    scaled = {name: 7 * s + 3 for name, s in scores.items()}
    assert threshold_plan(space, budget_ms, scaled) == threshold_plan(space, budget_ms, scores)
    equal = {name: torch.ones_like(s) for name, s in scores.items()}
    plan = threshold_plan(space, budget_ms, equal)
    assert space.plan_ms(plan) <= budget_ms


def test_random_plans_differ_by_seed() -> None:
    space = make_space()
    plans = {random_plan(space, 0.5 * slowest(space), seed) for seed in range(8)}
    assert len(plans) > 1
    assert random_plan(space, 0.5 * slowest(space), 3) in plans
