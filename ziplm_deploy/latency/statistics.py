"""Summaries of repeated timings: medians, bootstrap intervals, and when to stop measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

Floats = npt.NDArray[np.float64]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # of a file from anywhere, too
CONFIDENCE = 0.95
N_BOOTSTRAP = 1000
DRIFT_WINDOW = 9  # neighbouring samples: well under a second, while machines change their speed for seconds
DRIFT_PASSES = 4
# Standard error of a median of n normal samples: 1.2533 · sd / √n; sd from the median absolute deviation: 1.4826 · MAD.
MEDIAN_EFFICIENCY = 1.2533
MAD_TO_SIGMA = 1.4826


class Timing(BaseModel):
    """Summary of repeated timings of one thing, in milliseconds; each is finite and above 0."""

    median_ms: Milliseconds
    low_ms: Milliseconds  # bootstrap 95 % interval of the median
    high_ms: Milliseconds
    p90_ms: Milliseconds
    p99_ms: Milliseconds
    n: int = Field(ge=1)


def bootstrap_medians(
    samples: Sequence[float] | Floats,
    seed: int,
    n_bootstrap: int = N_BOOTSTRAP,
    groups: Sequence[int] | None = None,
) -> Floats:
    """Medians of ``n_bootstrap`` resamples of ``samples`` (with replacement), shape [n_bootstrap].

    ``groups`` [samples]: samples of a group have something in common, as those of one process do. Groups are then
    resampled first, and samples within them, so that differences between groups count (Kalibera and Jones, ISMM 2013).
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("expected at least one sample, found none")
    generator = np.random.default_rng(seed)
    if groups is not None and len(set(groups)) > 1:
        of_group = [values[np.asarray(groups) == group] for group in sorted(set(groups))]
        medians = np.empty(n_bootstrap)
        for index, chosen in enumerate(generator.integers(0, len(of_group), (n_bootstrap, len(of_group)))):
            medians[index] = np.median(
                [sample for group in chosen for sample in _resampled(of_group[group], generator)]
            )
        return medians
    draws = generator.integers(0, values.size, (n_bootstrap, values.size))
    return np.asarray(np.median(values[draws], axis=1), dtype=np.float64)  # [n_bootstrap, n] -> [n_bootstrap]


def _resampled(values: Floats, generator: np.random.Generator) -> Floats:
    return values[generator.integers(0, values.size, values.size)]


def interval(distribution: Floats, level: float = CONFIDENCE) -> tuple[float, float]:
    """Central ``level`` interval of bootstrap values."""
    low, high = np.quantile(distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(samples_ms: Sequence[float] | Floats, seed: int = 0, groups: Sequence[int] | None = None) -> Timing:
    """Median with bootstrap interval, p90, p99 of milliseconds; ``groups`` as in :func:`bootstrap_medians`."""
    values = np.asarray(samples_ms, dtype=np.float64)
    low, high = interval(bootstrap_medians(values, seed, groups=groups))
    p90, p99 = np.quantile(values, [0.90, 0.99])
    return Timing(
        median_ms=float(np.median(values)),
        low_ms=low,
        high_ms=high,
        p90_ms=float(p90),
        p99_ms=float(p99),
        n=values.size,
    )


def median_ratio(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = 0, processes: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """Median over rounds of the ratio within a round, with its bootstrap interval: (ratio, low, high).

    Both sequences hold one value a round, so that slow drift of the machine cancels. ``processes`` says which rounds
    were of the same processes; the interval then covers what differs between them.
    """
    ratios = np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)
    low, high = interval(bootstrap_medians(ratios, seed, groups=processes))
    return float(np.median(ratios)), low, high


def relative_standard_error(samples: Sequence[float] | Floats) -> float:
    """Robust standard error of the median, as a fraction of it; infinite below three samples."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size < 3:
        return float("inf")
    median = float(np.median(values))
    spread = MAD_TO_SIGMA * float(np.median(np.abs(values - median)))
    return MEDIAN_EFFICIENCY * spread / float(np.sqrt(values.size)) / median


def is_stable(samples: Sequence[float], window: int = 3, tolerance: float = 0.05) -> bool:
    """Whether the medians of the last two windows agree: the end of warm-up."""
    if len(samples) < 2 * window:
        return False
    before, after = np.median(samples[-2 * window : -window]), np.median(samples[-window:])
    return bool(abs(before / after - 1.0) <= tolerance)


def remove_drift(
    labels: Sequence[int] | npt.NDArray[np.int64], samples_ms: Sequence[float] | Floats, window: int = DRIFT_WINDOW
) -> tuple[Floats, Floats]:
    """Samples [n] in the order they were taken, without the machine's speed changes; and those speed factors [n].

    Virtual machines switch between speeds that differ by a third and stay there for seconds, so that medians of models
    that met different speeds do not compare. ``labels`` [n] says which model a sample belongs to. A sample is taken as
    model x speed x noise; the speed is the running median over neighbours (of all models) of sample / model median, and
    both are improved in turn. Random order makes a neighbourhood hold many models. Speeds have median 1.
    """
    model = np.unique(np.asarray(labels), return_inverse=True)[1]  # [n], values 0 … models - 1
    logs = np.log(np.asarray(samples_ms, dtype=np.float64))  # [n]
    n_models = int(model.max(initial=-1)) + 1
    speed = np.zeros_like(logs)
    for _ in range(DRIFT_PASSES if logs.size > window and n_models > 1 else 0):
        level = np.array([np.median((logs - speed)[model == index]) for index in range(n_models)])  # [models]
        speed = _running_median(logs - level[model], window)
        speed -= np.median(speed)
    return np.exp(logs - speed), np.exp(speed)


def _running_median(values: Floats, window: int) -> Floats:
    half = window // 2
    padded = np.pad(values, half, mode="reflect")  # [n + 2 half]
    views = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)  # [n, 2 half + 1]
    return np.asarray(np.median(views, axis=1), dtype=np.float64)
