"""Metrics as functions of outcomes and of how often each example counts: of the whole set, of parts, of resamples.

One definition serves all of them. ``counts`` is [resamples, examples]; every function returns [resamples].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ziplm_deploy.tasks.outcomes import Outcomes

Floats = npt.NDArray[np.float64]
PerExample = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Metric = Callable[[Outcomes, Floats], Floats]
ROUNDING = 1e-24  # variance of equal numbers around their rounded mean, where all numbers together have 1


def score(metric: Metric, outcomes: Outcomes) -> float:
    """The metric on the examples as they are."""
    return float(metric(outcomes, np.ones((1, len(outcomes))))[0])


def ratio_of_sums(numerator: str, denominator: str | None = None) -> Metric:
    """Metric that adds up two arrays over the examples and divides; without ``denominator`` the mean of the first."""

    def metric(outcomes: Outcomes, counts: Floats) -> Floats:
        above = counts @ outcomes[numerator].astype(np.float64)
        return _divide(above, counts.sum(1) if denominator is None else counts @ outcomes[denominator])

    return metric


# Classes: outcomes ``label`` and ``predicted``, class numbers [examples].


def class_counts(outcomes: Outcomes, counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Examples of each class that were predicted rightly, that were predicted, and that have it as label.

    Returns:
        Three arrays [resamples, classes], of the classes that are the label or the prediction of any example.
    """
    label, predicted = outcomes["label"], outcomes["predicted"]
    classes, numbers = np.unique(np.concatenate([label, predicted]), return_inverse=True)
    expected, found = numbers[: len(label)], numbers[len(label) :]
    return (
        _sums_by(found, counts * (expected == found), len(classes)),
        _sums_by(found, counts, len(classes)),
        _sums_by(expected, counts, len(classes)),
    )


def accuracy(outcomes: Outcomes, counts: Floats) -> Floats:
    """Share of right predictions."""
    right = (outcomes["label"] == outcomes["predicted"]).astype(np.float64)
    return _divide(counts @ right, counts.sum(1))


def macro_f1(outcomes: Outcomes, counts: Floats) -> Floats:
    """Mean F1 of the classes that are label or prediction of an example that counts."""
    right, found, expected = class_counts(outcomes, counts)
    n_classes = (found + expected > 0).sum(1).astype(np.float64)
    return _divide(_divide(2 * right, found + expected).sum(1), n_classes)


def weighted_f1(outcomes: Outcomes, counts: Floats) -> Floats:
    """Mean F1 of the classes, each as often as it is the label."""
    right, found, expected = class_counts(outcomes, counts)
    return _divide((expected * _divide(2 * right, found + expected)).sum(1), expected.sum(1))


def f1_of_class_1(outcomes: Outcomes, counts: Floats) -> Floats:
    """F1 of class 1 of two classes, as for MRPC and QQP."""
    expected, found = ((outcomes[name] == 1).astype(np.int64) for name in ("label", "predicted"))
    return f1_of_counts(expected * found, found, expected, counts)


def f1_of_counts(right: PerExample, found: PerExample, expected: PerExample, counts: Floats) -> Floats:
    """F1 of what was found rightly, found, and expected in each example; arrays [examples]."""
    return _divide(2 * (counts @ right), counts @ (found + expected))


def balanced_accuracy(outcomes: Outcomes, counts: Floats) -> Floats:
    """Mean over the classes that are labels of the share of their examples that were found."""
    right, _, expected = class_counts(outcomes, counts)
    return _divide(_divide(right, expected).sum(1), (expected > 0).sum(1).astype(np.float64))


def matthews(outcomes: Outcomes, counts: Floats) -> Floats:
    """Matthews correlation of any number of classes, as for CoLA; 0 where one class alone is label or prediction."""
    right, found, expected = class_counts(outcomes, counts)
    total = counts.sum(1)
    covariance = right.sum(1) * total - (found * expected).sum(1)
    variances = (total**2 - (found**2).sum(1)) * (total**2 - (expected**2).sum(1))
    return _divide(covariance, np.sqrt(np.maximum(variances, 0.0)))


def class_f1(outcomes: Outcomes) -> dict[int, float]:
    """F1 of each class that is label or prediction of an example, by its number."""
    right, found, expected = class_counts(outcomes, np.ones((1, len(outcomes))))
    classes = np.unique(np.concatenate([outcomes["label"], outcomes["predicted"]])).tolist()
    return dict(zip(classes, _divide(2 * right, found + expected)[0].tolist(), strict=True))


# Numbers: outcomes ``label`` and ``predicted`` [examples].


def pearson(outcomes: Outcomes, counts: Floats) -> Floats:
    """Linear correlation; 0 where one of both is constant, as a collapsed model's answers are."""
    return _correlation(_standardized(outcomes["predicted"]), _standardized(outcomes["label"]), counts)


def spearman(outcomes: Outcomes, counts: Floats) -> Floats:
    """Correlation of the ranks among the examples that count, ties sharing theirs; 0 where one of both is constant."""
    return _correlation(_ranks(outcomes["predicted"], counts), _ranks(outcomes["label"], counts), counts)


def _ranks(values: npt.NDArray[np.int64] | npt.NDArray[np.float64], counts: Floats) -> Floats:
    """Mean rank [resamples, examples] of each value if every example stood there as often as it counts."""
    distinct, numbers = np.unique(values, return_inverse=True)
    times = _sums_by(numbers, counts, len(distinct))  # in the order of the values
    middle = np.cumsum(times, axis=1) - (times - 1) / 2
    return np.asarray(middle[:, numbers], dtype=np.float64)


def _standardized(values: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Floats:
    """Values [1, examples] of mean 0 and variance 1, or all 0: what rounding leaves of a constant is no variance."""
    spread = float(np.std(values)) if np.ptp(values) else 0.0
    return np.asarray((values - np.mean(values)) / spread if spread else np.zeros(len(values)))[None, :]


def _correlation(one: Floats, other: Floats, counts: Floats) -> Floats:
    """Pearson's correlation, each example as often as it counts; values [resamples or 1, examples]."""
    total = counts.sum(1, keepdims=True)
    one = one - (counts * one).sum(1, keepdims=True) / total
    other = other - (counts * other).sum(1, keepdims=True) / total
    products = ((counts * a * b).sum(1) for a, b in ((one, other), (one, one), (other, other)))
    covariance, variance, other_variance = products
    varies = np.minimum(variance, other_variance) > ROUNDING * total[:, 0]  # a resample may hold one value only
    return _divide(covariance, np.where(varies, np.sqrt(variance * other_variance), 0.0))


# Entities, or labels of which an example may have several: outcomes ``right``, ``found`` and ``expected``
# [examples, types].


def right_and_wrong_entity(outcomes: Outcomes, number: int | None = None) -> dict[str, npt.NDArray[np.int64]]:
    """Arrays of two examples with one entity, which is found in the first of them only.

    It is of the type with this number; for None of the most frequent one.
    """
    frequency = outcomes["expected"].sum(0)  # [types]
    if number is None:
        number = int(frequency.argmax() if len(frequency) else 0)
    entity = (np.arange(len(frequency)) == number).astype(np.int64)
    expected, found = np.stack([entity, entity]), np.stack([entity, 0 * entity])
    return {"right": found, "found": found, "expected": expected}


def entity_precision(outcomes: Outcomes, counts: Floats) -> Floats:
    """Share of the entities found that are right."""
    return _divide(counts @ outcomes["right"].sum(1), counts @ outcomes["found"].sum(1))


def entity_recall(outcomes: Outcomes, counts: Floats) -> Floats:
    """Share of the expected entities that were found."""
    return _divide(counts @ outcomes["right"].sum(1), counts @ outcomes["expected"].sum(1))


def entity_f1(outcomes: Outcomes, counts: Floats) -> Floats:
    """F1 over the entities of all types."""
    either = (outcomes["found"] + outcomes["expected"]).sum(1)
    return _divide(2 * (counts @ outcomes["right"].sum(1)), counts @ either)


def macro_entity_f1(outcomes: Outcomes, counts: Floats) -> Floats:
    """Mean F1 of all types; 0 for a type that is neither expected nor found."""
    right, either = counts @ outcomes["right"], counts @ (outcomes["found"] + outcomes["expected"])
    return np.asarray(_divide(2 * right, either).mean(1), dtype=np.float64)


def type_f1(outcomes: Outcomes) -> dict[str, float]:
    """F1 of each type that is expected or found."""
    right, either = (
        np.asarray(values).sum(0) for values in (outcomes["right"], outcomes["found"] + outcomes["expected"])
    )
    return {name: 2 * int(a) / int(b) for name, a, b in zip(outcomes.names, right, either, strict=True) if b}


def _sums_by(groups: npt.NDArray[np.int64], counts: Floats, n_groups: int) -> Floats:
    """Sums [resamples, groups] of the counts of each group's examples."""
    order = np.argsort(groups, kind="stable")
    members = np.bincount(groups, minlength=n_groups)
    sums = np.zeros((len(counts), n_groups))
    starts = np.cumsum(members)[members > 0] - members[members > 0]
    sums[:, members > 0] = np.add.reduceat(counts[:, order], starts, axis=1)
    return sums


def _divide(above: Floats, below: Floats) -> Floats:
    """A quotient that is 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
