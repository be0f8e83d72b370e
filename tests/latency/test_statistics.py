"""Medians, bootstrap intervals, stopping rules and the correction for machine speed, on data with known truth."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziplm_deploy.latency.statistics import (
    Ratio,
    bootstrap_medians,
    interval,
    is_stable,
    process_ratio,
    relative_standard_error,
    remove_drift,
    summarize,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import interval_coverage


def test_summary_of_known_numbers() -> None:
    timing = summarize(list(range(1, 102)))
    assert (timing.median_ms, timing.p90_ms, timing.p99_ms, timing.n) == (51.0, 91.0, 100.0, 101)
    assert timing.low_ms < 51.0 < timing.high_ms


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_interval_lies_within_the_samples_and_around_the_median(samples: list[float]) -> None:
    timing = summarize(samples)
    assert min(samples) <= timing.low_ms <= timing.median_ms <= timing.high_ms <= max(samples)


def test_bootstrap_is_seeded() -> None:
    samples = np.random.default_rng(0).normal(10, 1, 30)
    assert np.array_equal(bootstrap_medians(samples, seed=4), bootstrap_medians(samples, seed=4))
    assert not np.array_equal(bootstrap_medians(samples, seed=4), bootstrap_medians(samples, seed=5))


def test_bootstrap_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = interval(bootstrap_medians(generator.normal(5.0, 1.0, 40), seed=trial, n_bootstrap=300))
        covered += low <= 5.0 <= high
    assert 0.88 <= covered / 200 <= 1.0


@pytest.mark.parametrize(
    "spread", [pytest.param(0.01, marks=pytest.mark.slow), 0.02, pytest.param(0.03, marks=pytest.mark.slow)]
)
def test_speedup_intervals_of_the_shipped_defaults_hold_the_truth_as_often_as_they_say(spread: float) -> None:
    """Benchmarks that end when every interval is narrow enough, or after the largest number of processes."""
    n_trials, truth = 700, interval_coverage.TARGET
    intervals = interval_coverage.simulated_intervals(spread, truth, n_trials, seed=int(1000 * spread))
    held = sum(speedup.low <= truth <= speedup.high for speedup, _ in intervals)
    assert 0.93 <= held / n_trials <= 0.97


def test_two_processes_are_said_to_tell_little() -> None:
    ratio = process_ratio([10.0, 10.0, 10.1, 10.1], [5.0, 5.0, 5.0, 5.0], [0, 0, 1, 1])
    assert ratio.value == pytest.approx(2.01, rel=1e-3)
    assert ratio.half_width == pytest.approx(12.706 * np.log(1.01) / 2, rel=0.05)  # Student's t of one degree


def test_a_process_counts_once_however_many_rounds_it_had() -> None:
    alone = process_ratio([20.0, 21.0, 22.0], [10.0] * 3, [0, 1, 2])
    repeated = process_ratio([20.0] * 9 + [21.0, 22.0], [10.0] * 11, [0] * 9 + [1, 2])
    assert (alone.low, alone.high) == (repeated.low, repeated.high)


def test_one_process_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two processes at least, found 1"):
        process_ratio([1.0, 2.0], [1.0, 1.0], [0, 0])


def test_noise_floor_and_width() -> None:
    ratio = Ratio(0.99, 0.97, 1.01)
    assert ratio.floor == pytest.approx(0.03)
    assert Ratio(1.0, 1 / 1.02, 1.02).half_width == pytest.approx(0.02)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_medians([], seed=0)


def test_ratio_within_rounds_ignores_drift_that_both_sides_share() -> None:
    drift = np.linspace(1, 3, 50)
    ratio = process_ratio(drift * 10.0, drift * 4.0, [0, 1, 2, 3, 4] * 10)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.5, 2.5, 2.5))


def test_standard_error_matches_simulation_and_shrinks_with_samples() -> None:
    generator = np.random.default_rng(2)
    medians = [np.median(generator.normal(100.0, 5.0, 64)) for _ in range(1500)]
    errors = [relative_standard_error(generator.normal(100.0, 5.0, 64)) for _ in range(200)]
    assert np.median(errors) == pytest.approx(np.std(medians) / 100.0, rel=0.15)
    assert relative_standard_error([1.0, 1.0]) == float("inf")
    assert relative_standard_error([2.0] * 5) == 0.0


def test_stability_needs_two_windows_that_agree() -> None:
    assert not is_stable([1.0] * 5)
    assert is_stable([1.0] * 6)
    assert not is_stable([3.0, 2.8, 2.6, 1.2, 1.1, 1.0])
    assert is_stable([9.0, 9.0, 9.0, 1.0, 1.01, 1.0, 1.0, 1.02, 1.0])


def switching_machine(seed: int, rounds: int, slow: float = 1.4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, samples and true latencies of 20 models on a machine that is slow in every other random stretch."""
    generator = np.random.default_rng(seed)
    truth = np.geomspace(1.0, 100.0, 20)
    labels = np.concatenate([generator.permutation(20) for _ in range(rounds)])
    speed = np.ones(labels.size)
    position, is_slow = 0, False
    while position < labels.size:
        length = int(generator.integers(20, 90))
        speed[position : position + length] = slow if is_slow else 1.0
        position, is_slow = position + length, not is_slow
    return labels, truth[labels] * speed * generator.lognormal(0, 0.02, labels.size), truth


def worst_ratio_error(labels: np.ndarray, samples: np.ndarray, truth: np.ndarray) -> float:
    medians = np.array([np.median(samples[labels == index]) for index in range(truth.size)])
    ratios = medians / truth
    return float(np.max(np.abs(ratios / np.median(ratios) - 1)))


@pytest.mark.parametrize("seed", range(4))
def test_drift_correction_recovers_the_ratios_between_models(seed: int) -> None:
    labels, samples, truth = switching_machine(seed, rounds=16)
    corrected, _ = remove_drift(labels, samples)
    assert worst_ratio_error(labels, corrected, truth) < 0.03
    assert worst_ratio_error(labels, samples, truth) > 0.1


def test_drift_correction_finds_the_speeds() -> None:
    labels, samples, _ = switching_machine(3, rounds=16)
    _, speeds = remove_drift(labels, samples)
    assert np.quantile(speeds, 0.95) / np.quantile(speeds, 0.05) == pytest.approx(1.4, rel=0.06)
    assert np.median(speeds) == pytest.approx(1.0)


def test_without_drift_nothing_much_changes() -> None:
    labels, samples, truth = switching_machine(5, rounds=16, slow=1.0)
    corrected, speeds = remove_drift(labels, samples)
    assert worst_ratio_error(labels, corrected, truth) < 0.03
    assert np.abs(speeds - 1).max() < 0.04


@pytest.mark.parametrize("labels", [[], [0], [0] * 50, [0, 1, 0, 1]])
def test_too_little_to_tell_drift_from_models_is_left_alone(labels: list[int]) -> None:
    samples = np.linspace(1.0, 2.0, len(labels))
    corrected, speeds = remove_drift(labels, samples)
    assert np.allclose(corrected, samples)
    assert np.allclose(speeds, 1.0)


def test_noise_that_only_slows_favours_nobody() -> None:
    """A baseline of two processes: the median of the mean of their latencies would lie 1 % above that of one."""
    generator = np.random.default_rng(0)
    processes = np.repeat(np.arange(5), 16).tolist()

    def latencies() -> np.ndarray:
        slowed = generator.random(80) < 0.3
        return 20.0 * np.exp(generator.normal(0.0, 0.005, 80) + slowed * generator.exponential(0.2, 80))

    ratios, of_means = [], []
    for _ in range(300):
        first, again, own = latencies(), latencies(), latencies()
        ratios.append(process_ratio([first, again], own, processes))  # type: ignore[arg-type]
        of_means.append(process_ratio((first + again) / 2, own, processes))  # type: ignore[arg-type]
    assert abs(np.mean([np.log(ratio.value) for ratio in ratios])) < 0.001
    assert np.mean([np.log(ratio.value) for ratio in of_means]) > 0.004
    assert np.mean([ratio.low <= 1.0 <= ratio.high for ratio in ratios]) > 0.92
