"""Which form each linear gets: the ladder of mixtures against all of them, and the search on it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ziplm_deploy.compression.int8.forms import (
    FORMS,
    MOST_TRIED,
    Cost,
    Form,
    Mixture,
    MixtureChoice,
    fastest_within,
    mixtures,
    that_fit,
)
from ziplm_deploy.compression.onnx_graphs import MOST_BYTES, check_size
from ziplm_deploy.errors import UsageError

Costs = dict[str, dict[Form, Cost]]


def random_costs(n: int, seed: int) -> Costs:
    generator = np.random.default_rng(seed)
    costs: Costs = {}
    for number in range(n):
        ms, divergence = generator.uniform(0.1, 4, len(FORMS)), generator.uniform(0, 1, len(FORMS))
        divergence[0] = 0  # float32
        costs[f"layers.{number}.part"] = {form: Cost(*cost) for form, *cost in zip(FORMS, ms, divergence, strict=True)}
    return costs


def divergence(costs: Costs, mixture: Mixture) -> float:
    return sum(costs[name][form].divergence for name, form in mixture.forms.items())


@pytest.mark.parametrize("seed", range(6))
def test_no_assignment_is_as_fast_as_a_mixture_and_loses_less(seed: int) -> None:
    costs = random_costs(4, seed)
    every = [
        (
            sum(costs[name][form].ms for name, form in zip(costs, forms, strict=True)),
            sum(costs[name][form].divergence for name, form in zip(costs, forms, strict=True)),
        )
        for forms in itertools.product(FORMS, repeat=len(costs))
    ]
    ladder = mixtures(costs, max_fp32_share=1.0)
    assert ladder[0].ms == pytest.approx(min(ms for ms, _ in every))
    for before, mixture in itertools.pairwise(ladder):
        assert mixture.ms > before.ms
        assert divergence(costs, mixture) < divergence(costs, before)
        assert sum(mixture.forms[name] != before.forms[name] for name in costs) == 1
    for mixture in ladder:
        assert mixture.ms == pytest.approx(sum(costs[name][form].ms for name, form in mixture.forms.items()))
        least = min(lost for ms, lost in every if ms <= mixture.ms + 1e-9)
        assert divergence(costs, mixture) == pytest.approx(least)
        if len(mixture.named("float32")) == len(costs) - 1:  # from here on no further linear may be
            break


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [0, 1, 2])
def test_the_other_forms_are_still_chosen_when_no_more_may_be_float32(seed: int, most: int) -> None:
    costs = random_costs(4, seed)
    ladder = mixtures(costs, most / 4)
    every = [
        sum(costs[name][form].divergence for name, form in zip(costs, forms, strict=True))
        for forms in itertools.product(FORMS, repeat=4)
        if forms.count("float32") <= most
    ]
    for before, mixture in itertools.pairwise(ladder):
        assert mixture.ms > before.ms
        assert divergence(costs, mixture) < divergence(costs, before)
    others = [min(cost.divergence for form, cost in of.items() if form != "float32") for of in costs.values()]
    assert divergence(costs, ladder[-1]) <= sum(others) + 1e-9, "as good as without any in float32"
    if most == 0:
        assert divergence(costs, ladder[-1]) == pytest.approx(min(every))


def test_no_more_linears_than_allowed_stay_float32_and_never_all() -> None:
    costs = random_costs(8, 0)
    shares = {share: mixtures(costs, share) for share in (0.0, 0.25, 1.0)}
    for share, ladder in shares.items():
        assert max(len(mixture.named("float32")) for mixture in ladder) <= min(share * 8, 7)
    fast = {name: {**of, "float32": Cost(0.01, 0.0)} for name, of in costs.items()}
    for most in (0, 3, 7):
        ladder = mixtures(fast, most / 8)
        assert len(ladder[0].named("float32")) == most
        least = sum(
            sorted(min(cost.ms for form, cost in of.items() if form != "float32") for of in costs.values())[: 8 - most]
        )
        assert ladder[0].ms == pytest.approx(least + 0.01 * most)
    with pytest.raises(UsageError, match="expected linears to choose forms for, found none"):
        mixtures({}, 0.5)


def test_mixtures_that_no_file_holds_are_left_out() -> None:
    ladder = [
        Mixture({"a": "weight-only-4", "b": "int8"}, 1.0),
        Mixture({"a": "weight-only-8", "b": "int8"}, 2.0),
        Mixture({"a": "weight-only-8", "b": "float32"}, 3.0),
    ]
    n_weights = {"a": 1000, "b": 100}
    for most, kept in ((1525.0, 3), (1524.9, 2), (1225.0, 2), (1224.0, 1), (0.0, 1)):
        assert that_fit(ladder, n_weights, most) == ladder[:kept]
    tied = [Mixture({"a": "int8", "head": form}, ms) for form, ms in (("weight-only-8", 1.0), ("float32", 2.0))]
    n_weights = {"a": 1000, "head": 100}
    for most, kept in ((1512.5, tied), (1400.0, tied[1:]), (1399.0, tied[:1])):  # in float32 it is the embedding itself
        assert that_fit(tied, n_weights, most, 400.0) == kept
    slower = [tied[1], tied[0]]
    assert that_fit(slower, n_weights, 1512.5, 400.0) == slower
    assert that_fit(slower, n_weights, 1512.4, 400.0) == slower[:1]  # the embedding stays beside the head
    check_size(MOST_BYTES)
    with pytest.raises(UsageError, match=r"expected INT8 files of up to 2\.0 GB, found weights of 2\.5 GB"):
        check_size(2.5e9)


def ladder_of(n: int) -> list[Mixture]:
    return [
        Mixture({"head": "int8", "layers.0.up": "float32" if n > 3 else "int8"}, float(ms)) for ms in range(1, n + 1)
    ]


@pytest.mark.parametrize(("n", "first"), [(40, 0), (40, 1), (40, 13), (40, 39), (2, 1), (1, 0)])
def test_the_fastest_that_holds_the_budget_is_found(tmp_path: Path, n: int, first: int) -> None:
    """The loss of rung i is 1 % x (n - i) / (n - first): from ``first`` on it is within 1 %."""
    ladder, written = ladder_of(n), []

    def write(mixture: Mixture, path: Path) -> None:
        written.append(mixture)
        path.write_text(str(mixture.ms))

    def judge(path: Path) -> float:
        return -(1 + 0.01 * (n + 1 - float(path.read_text())) / (n - first))

    choice = fastest_within(tmp_path / "made.onnx", write, judge, ladder, -1.0, 0.01 + 1e-9)
    assert choice.within_budget
    assert choice.mixture is ladder[first]
    assert (tmp_path / "made.onnx").read_text() == str(ladder[first].ms)
    assert [path.name for path in tmp_path.iterdir()] == ["made.onnx"]
    assert len(written) == len(choice.tried) <= MOST_TRIED
    assert choice.score == judge(tmp_path / "made.onnx")


def test_without_any_that_holds_the_budget_the_best_is_written_and_said_to_be_outside(tmp_path: Path) -> None:
    scores = {1.0: 0.3, 5.0: 0.2}
    choice = fastest_within(
        tmp_path / "made.onnx",
        lambda mixture, path: path.write_text(str(mixture.ms)) and None,
        lambda path: scores[float(path.read_text())],
        ladder_of(5),
        1.0,
        0.1,
    )
    assert (choice.within_budget, choice.score, choice.mixture.ms) == (False, 0.3, 1.0)
    assert choice.tried == ((1, 0.3), (1, 0.2))
    assert choice.fp32_linears == ("layers.0.up",)
    assert (tmp_path / "made.onnx").read_text() == "1.0"


def searched(folder: Path, ladder: list[Mixture], scores: list[float], max_loss: float) -> MixtureChoice:
    """The search on rungs with these scores, of a model that scores 1."""
    places = {mixture.ms: place for place, mixture in enumerate(ladder)}
    return fastest_within(
        folder / "made.onnx",
        lambda mixture, path: path.write_text(str(places[mixture.ms])) and None,
        lambda path: scores[int(path.read_text())],
        ladder,
        1.0,
        max_loss,
    )


def test_looks_go_where_the_divergence_says_that_the_budget_is_met(tmp_path: Path) -> None:
    """Loss grows with divergence, twice as fast: of 400 rungs few have to be looked at."""
    n, first = 400, 291
    ladder = [Mixture({"head": "int8"}, 100 + place, divergence=(n - place) ** 2 / 1e4) for place in range(n)]
    scores = [1 - 2 * mixture.divergence for mixture in ladder]
    choice = searched(tmp_path, ladder, scores, 2 * ladder[first].divergence + 1e-9)
    assert choice.within_budget
    assert choice.mixture is ladder[first]
    assert len(choice.tried) <= 4


@pytest.mark.parametrize(("constant", "power"), [(0.008, 1.0), (0.0, 0.5), (0.0, 2.0), (0.0099, 1.0)])
def test_losses_that_divergence_does_not_tell_are_found_within_the_budget(
    constant: float, power: float, tmp_path: Path
) -> None:
    """A part of the loss may be of no linear, as that of embeddings; and losses need not grow as divergences do."""
    ladder = [Mixture({"head": "int8"}, 100 + place, divergence=(400 - place) ** 2 / 1e4) for place in range(401)]
    scores = [1 - constant - 0.3 * (mixture.divergence / 16) ** power for mixture in ladder]
    choice = searched(tmp_path, ladder, scores, 0.01)
    fastest = next(place for place, score in enumerate(scores) if score >= 0.99)
    assert choice.within_budget
    assert choice.mixture.ms < 1.1 * ladder[fastest].ms


@pytest.mark.parametrize("seed", range(8))
def test_noise_leaves_the_choice_within_the_budget_it_was_judged_by(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ladder = [Mixture({"head": "int8"}, 100 + place, divergence=(200 - place) / 1e3) for place in range(200)]
    scores = [1 - 1.5 * mixture.divergence + generator.normal(0, 0.02) for mixture in ladder]
    choice = searched(tmp_path, ladder, scores, 0.05)
    held = [place for place, score in enumerate(scores) if (1, score) in choice.tried or (0, score) in choice.tried]
    assert choice.within_budget == (choice.score >= 0.95)
    assert choice.mixture is ladder[min(place for place in held if scores[place] >= 0.95)]
    assert len(choice.tried) <= MOST_TRIED
