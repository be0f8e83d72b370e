"""How far a score, or the difference of two, would move on other examples: bootstrap over the examples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ziplm_deploy.tasks.metrics import Floats, Metric
from ziplm_deploy.tasks.outcomes import Outcomes

N_RESAMPLES = 2000
CONFIDENCE = 0.95
_CELLS = 1 << 20  # of one block of resamples: it should stay in the cache of a core


def resampled_scores(metric: Metric, outcomes: Outcomes, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Floats:
    """The metric [n_resamples] on sets of as many examples, drawn with replacement.

    Models evaluated on the same examples meet the same resamples, so that their scores compare one by one.
    """
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
