"""Intervals of scores and of differences: they hold what they say on populations whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.entities import TagScheme
from ziplm_deploy.tasks.metrics import Metric, accuracy, spearman
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.resampling import Comparison, ResampledScores, resampled
from ziplm_deploy.tasks.tokens import _entity_outcomes

SIMULATED, RESAMPLES = 400, 400  # standard error of a coverage of 95 %: 1.1 points
Pair = tuple[Outcomes, Outcomes]  # of the dense model and of another one
TASK_OF = {accuracy: "text-classification", spearman: "sentence-similarity"}


def classifiers(generator: np.random.Generator, n: int, lost: float, gained: float) -> Pair:
    """Dense is right on 85 %; the other one loses some of those and gains some of the rest."""
    label = generator.integers(0, 3, n)
    right = generator.random(n) < 0.85
    other = np.where(right, generator.random(n) >= lost, generator.random(n) < gained)
    return tuple(  # type: ignore[return-value]
        Outcomes({"label": label, "predicted": np.where(each, label, (label + 1) % 3)}) for each in (right, other)
    )


def embeddings(generator: np.random.Generator, n: int, noise: float) -> Pair:
    """Graded similarities with ties; the other model's cosines are the dense one's with more noise."""
    latent = generator.normal(size=n)
    label = np.clip(np.round(2 * latent + 5) / 2, 0, 5)
    cosine = np.tanh(latent + 0.6 * generator.normal(size=n))
    other = np.tanh(np.arctanh(np.clip(cosine, -0.999999, 0.999999)) + noise * generator.normal(size=n))
    return Outcomes({"label": label, "predicted": cosine}), Outcomes({"label": label, "predicted": other})


def coverage(metric: Metric, draw: Callable[[np.random.Generator, int], Pair], n: int) -> dict[str, float]:
    """Percent of simulated evaluations whose intervals hold the truth, by what the interval is of."""
    generator = np.random.default_rng(0)
    dense, other = (float(metric(each, np.ones((1, len(each))))[0]) for each in draw(generator, 1_000_000))
    task, hits = get_task(TASK_OF[metric]), {"difference": 0, "percent": 0, "score": 0}  # type: ignore[arg-type]
    (name,) = (name for name, known in task.metrics.items() if known is metric)
    for seed in range(SIMULATED):
        reference, candidate = (ResampledScores(task, each, seed, RESAMPLES) for each in draw(generator, n))
        found = candidate.beside(reference, name)
        low, high = candidate.interval(name)
        hits["difference"] += found.low <= other - dense <= found.high
        hits["percent"] += (found.percent_low or 0) <= 100 * other / dense <= (found.percent_high or 0)
        hits["score"] += low <= other <= high
    return {what: 100 * count / SIMULATED for what, count in hits.items()}


@pytest.mark.parametrize(
    ("metric", "draw"),
    [
        (accuracy, lambda g, n: classifiers(g, n, lost=0.06, gained=0.2)),
        (spearman, lambda g, n: embeddings(g, n, noise=0.5)),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(metric: Metric, draw: Any) -> None:
    found = coverage(metric, draw, n=300)
    assert all(93 <= percent <= 97 for percent in found.values()), found


@pytest.mark.parametrize("n", [50, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("metric", "draw"),
    [
        (accuracy, lambda g, n: classifiers(g, n, lost=0.01, gained=0.02)),  # differ on one answer in a hundred
        (spearman, lambda g, n: embeddings(g, n, noise=0.2)),
    ],
)
def test_small_sets_have_intervals_that_are_too_wide_rather_than_too_narrow(metric: Metric, draw: Any, n: int) -> None:
    found = coverage(metric, draw, n)
    assert min(found["difference"], found["percent"]) >= 93, found


def test_the_difference_of_accuracies_has_the_interval_of_bonett_and_price() -> None:
    """Adjusted Wald with one more answer of each kind of disagreement; the bootstrap is its normal distribution."""
    n, only_dense, only_other = 400, 31, 12
    dense, other = (np.ones(n, dtype=int) for _ in range(2))
    other[:only_dense], dense[only_dense : only_dense + only_other] = 0, 0
    task, label = get_task("text-classification"), np.ones(n, dtype=int)
    reference, candidate = (
        ResampledScores(task, Outcomes({"label": label, "predicted": each}), n_resamples=20_000)
        for each in (dense, other)
    )
    found = candidate.beside(reference, "accuracy")
    p, q = (only_other + 1) / (n + 2), (only_dense + 1) / (n + 2)
    half_width = norm.ppf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert found.difference == pytest.approx((only_other - only_dense) / n)
    assert (found.low, found.high) == pytest.approx((p - q - half_width, p - q + half_width), abs=0.003)


@pytest.mark.parametrize("n", [30, 1000])
def test_two_models_that_agree_everywhere_still_differ_by_what_was_not_seen(n: int) -> None:
    task, label = get_task("text-classification"), np.arange(n) % 4
    one, other = (ResampledScores(task, Outcomes({"label": label, "predicted": label}), seed=1) for _ in range(2))
    found = other.beside(one, "accuracy")
    assert found.difference == 0
    assert found.low < 0 < found.high
    assert found.high == pytest.approx(3 / n, rel=0.5)  # the rule of three
    assert found.keeps(99.0) == ("undecided" if n == 30 else "met")


def test_intervals_of_close_models_are_those_of_pairs_and_not_of_two_scores() -> None:
    task = get_task("text-classification")
    reference, candidate = (
        ResampledScores(task, each) for each in classifiers(np.random.default_rng(0), 1000, lost=0.01, gained=0.05)
    )
    found, (low, high) = candidate.beside(reference, "accuracy"), candidate.interval("accuracy")
    assert found.high - found.low < 0.6 * (high - low)
    assert low < 0.85 < high


TEXTS = [["B-X", "I-X", "O"], ["O", "O"], ["B-X", "B-Y", "O"]] * 30
OTHERS = [["B-X", "I-X", "O"], ["O", "B-Y"], ["B-X", "O", "O"]] * 30
MASKED = {"masked": np.array([2, 3, 1] * 30), "log_likelihood": np.linspace(-9, -1, 90)}
SCHEME = TagScheme.of(["O", "B-X", "I-X", "B-Y"])
MULTI = ("right", "found", "expected")
CASES: dict[str, tuple[Outcomes, Outcomes]] = {
    "token-classification": (_entity_outcomes(TEXTS, TEXTS, SCHEME), _entity_outcomes(TEXTS, OTHERS, SCHEME)),
    "question-answering": (
        Outcomes({"f1": np.ones(90), "exact_match": np.ones(90)}),
        Outcomes({"f1": np.array([1.0, 0.5, 0.25] * 30), "exact_match": np.array([1.0, 0.0, 0.0] * 30)}),
    ),
    "fill-mask": (
        Outcomes({**MASKED, "right": np.array([2, 3, 1] * 30)}),
        Outcomes({**MASKED, "right": np.array([1, 3, 0] * 30)}),
    ),
    "text-classification": classifiers(np.random.default_rng(1), 90, lost=0.4, gained=0.0),
    "image-classification": classifiers(np.random.default_rng(2), 90, lost=0.4, gained=0.0),
    "multi-label-classification": (
        Outcomes({name: np.array([[1, 0], [0, 1], [1, 1]] * 30) for name in MULTI} | {"exact": np.ones(90, int)}),
        Outcomes(
            {"right": np.array([[1, 0], [0, 0], [1, 0]] * 30), "found": np.array([[1, 0], [1, 0], [1, 0]] * 30)}
            | {"expected": np.array([[1, 0], [0, 1], [1, 1]] * 30), "exact": np.array([1, 0, 0] * 30)}
        ),
    ),
    "text-regression": embeddings(np.random.default_rng(3), 90, noise=3.0),
}


@pytest.mark.parametrize("name", list(CASES))
def test_every_task_tells_a_worse_model_from_its_dense_one(name: str) -> None:
    task = get_task(name)  # type: ignore[arg-type]
    reference, candidate = (ResampledScores(task, each) for each in CASES[name])
    scores, dense = (task.scores(each) for each in reversed(CASES[name]))
    for metric in task.metrics:
        found, (low, high) = candidate.beside(reference, metric), candidate.interval(metric)
        assert found.difference == pytest.approx(scores[metric] - dense[metric])
        assert low <= scores[metric] <= high
        assert found.low <= found.difference <= found.high
        again = ResampledScores(task, CASES[name][1]).beside(ResampledScores(task, CASES[name][0]), metric)
        assert again == found, "the same seed draws the same examples"
    found = candidate.beside(reference, task.metric_name)
    assert (found.high < 0, found.keeps(99.0)) == (True, "missed")


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(99.0, 101.0, "met"), (98.9, 101.0, "undecided"), (90.0, 98.9, "missed")]
)
def test_a_share_that_must_be_kept(low: float, high: float, expected: str) -> None:
    found = Comparison(difference=0, low=0, high=0, percent=100, percent_low=low, percent_high=high, n_examples=9)
    assert found.keeps(99.0) == expected


def test_no_percent_of_nothing() -> None:
    task = get_task("text-classification")
    label = np.array([0, 1] * 20)
    wrong, right = (ResampledScores(task, Outcomes({"label": label, "predicted": each})) for each in (1 - label, label))
    found = right.beside(wrong, "accuracy")
    assert (found.difference, found.percent, found.percent_low, found.keeps(99.0)) == (1.0, None, None, None)
    with pytest.raises(ValueError, match="expected the same examples, found 40 and 39"):
        right.beside(ResampledScores(task, Outcomes({"label": label[1:], "predicted": label[1:]})), "accuracy")


def test_resamples_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = classifiers(np.random.default_rng(0), 40, lost=0.1, gained=0.1)[1]
    whole = resampled(accuracy, outcomes, seed=2, n_resamples=50)
    monkeypatch.setattr("ziplm_deploy.tasks.resampling._CELLS", 7 * 40)
    np.testing.assert_array_equal(resampled(accuracy, outcomes, seed=2, n_resamples=50), whole)
    assert whole.shape == (50,)
