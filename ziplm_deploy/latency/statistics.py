"""Summaries of repeated timings: medians, their intervals, and when to stop measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # of a file from anywhere, too
Speedup = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # the same
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
    low_ms: Milliseconds  # 95 % interval of the median
    high_ms: Milliseconds
    p90_ms: Milliseconds
    p99_ms: Milliseconds
    n: int = Field(ge=1)


class WorkloadTiming(Timing):
    """Summary of the expected latency of a workload: its calls' weighted sum; and of each call where there are several.

    Its median is the weighted sum of the calls' medians, so that what is added up for each call adds up for all.
    """

    of_calls: list[Timing] = Field(default_factory=list, exclude_if=lambda timings: not timings)  # none: of one call

    def median_ms_of(self, call: int | None) -> float:
        """Median milliseconds of one call, or, for None, of the workload."""
        return self.median_ms if call is None or not self.of_calls else self.of_calls[call].median_ms


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval, as a fraction of the value."""
        return float(np.sqrt(self.high / self.low)) - 1.0

    @property
    def floor(self) -> float:
        """How far from 1 the interval reaches: of a model against itself, the noise of the measurement."""
        return max(self.high - 1.0, 1.0 - self.low)

    @property
    def floor_text(self) -> str:
        """The floor in percent, as texts have it."""
        return f"{100 * self.floor:.2f} %" if self.floor < 1 else "more than 100 %"


def process_ratio(
    numerator: Sequence[float] | Sequence[Sequence[float]], denominator: Sequence[float], processes: Sequence[int]
) -> Ratio:
    """Ratio of two models over processes, with Student's t interval; the processes are the sample.

    Where a process lies in memory shifts its latency by 1 to 3 %, whatever the number of its rounds (Kalibera and
    Jones, ISMM 2013). Each process therefore gives one value, the median over its rounds of the log ratio within a
    round, in which the machine's drift cancels; their mean is the estimate. One that was disturbed widens the interval.

    Of a numerator with several rows each is compared for itself, and the medians are averaged: the median of a mean of
    latencies, whose noise only slows, lies above that of one of them.

    Args:
        numerator, denominator: milliseconds, one value a round; the numerator may have several rows.
        processes: which process a round was of; at least two.
    """
    logs = np.log(np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64))
    return Ratio(*map(float, np.exp(_of_groups(logs, processes))))


def _of_groups(logs: Floats, groups: Sequence[int]) -> tuple[float, float, float]:
    """Mean over groups of the median within one, of ``logs`` [(rows,) n], and its t interval: (mean, low, high)."""
    rows, of_group = np.atleast_2d(logs), np.asarray(groups)
    medians = np.array([np.median(rows[:, of_group == group], axis=1).mean() for group in np.unique(of_group)])
    if medians.size < 2:
        raise ValueError(f"expected samples of two processes at least, found {medians.size}")
    mean = float(medians.mean())
    quantile = float(stdtrit(medians.size - 1, (1 + CONFIDENCE) / 2))
    half = quantile * float(medians.std(ddof=1)) / float(np.sqrt(medians.size))
    return mean, mean - half, mean + half


def bootstrap_medians(samples: Sequence[float] | Floats, seed: int, n_bootstrap: int = N_BOOTSTRAP) -> Floats:
    """Medians of ``n_bootstrap`` resamples of ``samples`` (with replacement), shape [n_bootstrap]."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("expected at least one sample, found none")
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, values.size, (n_bootstrap, values.size))
    return np.asarray(np.median(values[draws], axis=1), dtype=np.float64)  # [n_bootstrap, n] -> [n_bootstrap]


def interval(distribution: Floats, level: float = CONFIDENCE) -> tuple[float, float]:
    """Central ``level`` interval of bootstrap values."""
    low, high = np.quantile(distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(samples_ms: Sequence[float] | Floats, seed: int = 0, processes: Sequence[int] | None = None) -> Timing:
    """Median, p90, p99 of milliseconds, and the median's interval.

    With ``processes`` [samples], which say where each sample is from, that is Student's t interval over them, stretched
    to hold the median of all; without, all are of one process, and it is that of a bootstrap over samples.
    """
    values = np.asarray(samples_ms, dtype=np.float64)
    median = float(np.median(values))
    if processes is None:
        low, high = interval(bootstrap_medians(values, seed))
    else:
        _, low, high = map(float, np.exp(_of_groups(np.log(values), processes)))
        low, high = min(low, median), max(high, median)
    p90, p99 = np.quantile(values, [0.90, 0.99])
    return Timing(median_ms=median, low_ms=low, high_ms=high, p90_ms=float(p90), p99_ms=float(p99), n=values.size)


def summarize_calls(
    samples_ms: Floats, weights: Sequence[float], draws_ms: Floats | None = None, floor_ms: float = 0.0
) -> WorkloadTiming:
    """Summary of timings [calls, n] of a workload whose calls have these weights; see :class:`WorkloadTiming`.

    Args:
        draws_ms: bootstrapped medians [calls, draws] where samples alone do not tell, as of differences.
        floor_ms: least value of a figure: differences of noisy medians can fall below zero, time cannot.
    """
    if draws_ms is None:
        draws_ms = np.stack([bootstrap_medians(row, seed=0) for row in samples_ms])
    timings = [
        _timing(row, draws, float(np.median(row)), floor_ms) for row, draws in zip(samples_ms, draws_ms, strict=True)
    ]
    if len(timings) == 1:
        return WorkloadTiming(**timings[0].model_dump())
    shares = np.asarray(weights, dtype=np.float64)
    median = float(shares @ [timing.median_ms for timing in timings])
    whole = _timing(shares @ samples_ms, shares @ draws_ms, median, floor_ms)
    return WorkloadTiming(**whole.model_dump(), of_calls=timings)


def _timing(values_ms: Floats, draws_ms: Floats, median_ms: float, floor_ms: float) -> Timing:
    low, high = interval(draws_ms)
    p90, p99 = np.quantile(values_ms, [0.90, 0.99])
    milliseconds = {"median_ms": median_ms, "low_ms": low, "high_ms": high, "p90_ms": p90, "p99_ms": p99}
    return Timing(n=values_ms.size, **{name: max(float(value), floor_ms) for name, value in milliseconds.items()})


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
