"""The map from sums of parts to whole models: exact where it was measured, rising everywhere, invertible."""

from __future__ import annotations

import numpy as np
import pytest

from ziplm_deploy.latency.correction import REFERENCE_ERROR, WHOLE_ERROR, SumCorrection
from ziplm_deploy.latency.statistics import Floats

EXACT = 1e-6
POINTS = [(10.0, 9.8, EXACT), (0.5, 0.5, EXACT), (2.0, 2.1, EXACT), (4.0, 4.1, EXACT)]


def test_without_points_nothing_changes() -> None:
    assert SumCorrection([]).whole_ms(3.7) == pytest.approx(3.7)
    assert SumCorrection([]).sum_ms(3.7) == pytest.approx(3.7)


@pytest.mark.parametrize(("sum_ms", "whole_ms", "error"), POINTS)
def test_models_measured_exactly_are_predicted_as_measured(sum_ms: float, whole_ms: float, error: float) -> None:
    assert SumCorrection(POINTS).whole_ms(sum_ms) == pytest.approx(whole_ms, rel=1e-3)


def test_ratios_are_interpolated_and_constant_outside() -> None:
    correction = SumCorrection(POINTS)
    assert 1.0 < correction.whole_ms(1.0) < 1.05
    assert correction.whole_ms(0.1) == pytest.approx(0.1)
    assert correction.whole_ms(20.0) == pytest.approx(19.6)


def truth(sum_ms: Floats) -> Floats:
    """Stacks stay in a cache that whole models of medium size leave."""
    return sum_ms * (1 + 0.04 * np.exp(-(np.log(sum_ms / 6) ** 2)))


def test_noise_of_single_models_is_smoothed() -> None:
    """Beside interpolation between the points, which this was before."""
    sums, asked, ours, others = np.array([0.5, 3.0, 6.0, 11.0, 19.0, 35.0]), np.geomspace(3, 30, 20), [], []
    errors = np.array([REFERENCE_ERROR, *[WHOLE_ERROR] * 4, REFERENCE_ERROR])
    for seed in range(200):
        measured = truth(sums) * np.exp(np.random.default_rng(seed).normal(0, errors))
        correction = SumCorrection(list(zip(sums.tolist(), measured.tolist(), errors.tolist(), strict=True)))
        ours.append([np.log(correction.whole_ms(float(ms)) / truth(ms)) for ms in asked])
        others.append(np.interp(np.log(asked), np.log(sums), np.log(measured / sums)) + np.log(asked / truth(asked)))
    rms, rms_interpolated = (float(np.sqrt(np.mean(np.square(found)))) for found in (ours, others))
    assert rms < 0.85 * rms_interpolated
    assert rms < 0.75 * WHOLE_ERROR


@pytest.mark.parametrize("seed", range(20))
def test_any_noise_leaves_it_rising_and_invertible(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sums = generator.uniform(0.5, 50, 6)
    points = [(float(ms), float(ms * generator.lognormal(0, 0.5)), WHOLE_ERROR) for ms in sums]
    correction = SumCorrection(points)
    asked = np.geomspace(0.1, 100, 60)
    found = [correction.whole_ms(float(ms)) for ms in asked]
    assert np.all(np.diff(found) > 0)
    assert [correction.sum_ms(ms) for ms in found] == pytest.approx(list(asked), rel=1e-4)


def test_equal_sums_are_no_error() -> None:
    correction = SumCorrection([(2.0, 2.0, WHOLE_ERROR), (2.0, 2.4, WHOLE_ERROR), (5.0, 5.0, WHOLE_ERROR)])
    assert 1.9 < correction.whole_ms(2.0) < 2.5
    assert np.isfinite(correction.sum_ms(2.2))
