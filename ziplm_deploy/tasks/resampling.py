"""How far a score, or the difference of two, would move on other examples: bootstrap over the examples.

Percentile intervals over resamples, with one thing added: where answers are right or wrong, two made-up examples take
part, one that only the first model answers rightly and one that only the second does. Without them a difference that
rests on few answers has an interval that is far too narrow: of no width where both models err on the same examples. For
the accuracy of two models this is the interval of Bonett and Price (2012), "Adjusted Wald confidence interval for a
difference of binomial proportions based on paired data".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from ziplm_deploy.tasks.metrics import Floats, Metric, score
from ziplm_deploy.tasks.outcomes import Outcomes

N_RESAMPLES = 2000
CONFIDENCE = 0.95
_CELLS = 1 << 20  # of one block of resamples: it should stay in the cache of a core

Decision = Literal["met", "missed", "undecided"]


class Comparison(BaseModel):
    """A score beside another model's on the same examples, with 95 % intervals; percent of a score above 0 only."""

    difference: float
    low: float
    high: float
    percent: float | None
    percent_low: float | None
    percent_high: float | None
    n_examples: int

    def keeps(self, percent: float) -> Decision | None:
        """Whether this much of the other score is kept, as far as the interval tells; None: no percent is defined."""
        if self.percent_low is None or self.percent_high is None:
            return None
        if self.percent_low >= percent:
            return "met"
        return "missed" if self.percent_high < percent else "undecided"


class Judge(Protocol):
    """What scores are computed by: a task, or another way to look at what models did."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Functions of the outcomes by name."""
        ...

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes | None:
        """See :meth:`ziplm_deploy.tasks.base.Task.right_and_wrong`."""
        ...


class ResampledScores:
    """One model's scores on resamples of the evaluation examples, each metric computed once.

    Models that were evaluated on the same examples meet the same resamples, so that their scores compare one by one.
    """

    def __init__(self, judge: Judge, outcomes: Outcomes, seed: int = 0, n_resamples: int = N_RESAMPLES) -> None:
        self.n_examples = len(outcomes)
        self._judge, self._outcomes, self._seed, self._n_resamples = judge, outcomes, seed, n_resamples
        self._known: dict[tuple[str, bool], Floats] = {}
        self._parts: dict[bytes, ResampledScores] = {}

    def on(self, examples: npt.NDArray[np.int64] | None) -> ResampledScores:
        """Scores of this model on some examples alone, given by their indices; None: on all, as they are."""
        if examples is None:
            return self
        key = examples.tobytes()
        if key not in self._parts:
            part = self._outcomes.take(examples)
            self._parts[key] = ResampledScores(self._judge, part, self._seed, self._n_resamples)
        return self._parts[key]

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % interval of the score."""
        return interval(self._resampled(metric, is_reference=False))

    def beside(self, other: ResampledScores, metric: str) -> Comparison:
        """This model's score less the other's, and in percent of it.

        Raises:
            ValueError: the other one was evaluated on another number of examples.
        """
        if self.n_examples != other.n_examples:
            raise ValueError(f"expected the same examples, found {self.n_examples} and {other.n_examples}")
        own, others = self._resampled(metric, is_reference=False), other._resampled(metric, is_reference=True)
        value, other_value = self.score(metric), other.score(metric)
        low, high = interval(own - others)
        comparable = other_value > 0 and bool((others > 0).all())
        percent_low, percent_high = interval(100 * own / others) if comparable else (None, None)
        return Comparison(
            difference=value - other_value,
            low=low,
            high=high,
            percent=100 * value / other_value if comparable else None,
            percent_low=percent_low,
            percent_high=percent_high,
            n_examples=self.n_examples,
        )

    def score(self, metric: str) -> float:
        """The score on the examples as they are."""
        return score(self._judge.metrics[metric], self._outcomes)

    def _resampled(self, metric: str, *, is_reference: bool) -> Floats:
        """Scores [resamples]; a reference is wrong where the model beside it is right, of the two made-up examples."""
        key = (metric, is_reference)
        if key not in self._known:
            added = self._judge.right_and_wrong(self._outcomes)
            outcomes = self._outcomes if added is None else self._outcomes.followed_by(added, reverse=is_reference)
            self._known[key] = resampled(self._judge.metrics[metric], outcomes, self._seed, self._n_resamples)
        return self._known[key]


def resampled(metric: Metric, outcomes: Outcomes, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Floats:
    """The metric [n_resamples] on sets of as many examples, drawn with replacement."""
    return np.concatenate([metric(outcomes, counts) for counts in _resamples(len(outcomes), seed, n_resamples)])


def _resamples(n_examples: int, seed: int, n_resamples: int) -> Iterator[Floats]:
    """How often each example was drawn, in blocks [resamples, examples]."""
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // n_examples)
    for first in range(0, n_resamples, block):
        size = min(block, n_resamples - first)
        drawn = generator.integers(0, n_examples, (size, n_examples)) + n_examples * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n_examples).reshape(size, n_examples).astype(np.float64)


def interval(values: Floats, level: float = CONFIDENCE) -> tuple[float, float]:
    """The central ``level`` of resampled values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
