"""The map from sums of parts to whole models: exact where it was measured, rising everywhere, invertible."""

from __future__ import annotations

import numpy as np
import pytest

from ziplm_deploy.latency.correction import SumCorrection

POINTS = [(10.0, 9.5), (0.5, 0.5), (2.0, 2.2), (4.0, 4.1)]


def test_without_points_nothing_changes() -> None:
    assert SumCorrection([]).whole_ms(3.7) == pytest.approx(3.7)
    assert SumCorrection([]).sum_ms(3.7) == pytest.approx(3.7)


@pytest.mark.parametrize(("sum_ms", "whole_ms"), POINTS)
def test_measured_models_are_predicted_as_measured(sum_ms: float, whole_ms: float) -> None:
    assert SumCorrection(POINTS).whole_ms(sum_ms) == pytest.approx(whole_ms)


def test_ratios_are_interpolated_and_constant_outside() -> None:
    correction = SumCorrection(POINTS)
    assert correction.whole_ms(1.0) == pytest.approx(np.sqrt(1.1))  # halfway between 0.5 and 2 in logarithms
    assert correction.whole_ms(0.1) == pytest.approx(0.1)
    assert correction.whole_ms(20.0) == pytest.approx(19.0)


@pytest.mark.parametrize("seed", range(20))
def test_any_noise_leaves_it_rising_and_invertible(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sums = generator.uniform(0.5, 50, 6)
    points = [(float(ms), float(ms * generator.lognormal(0, 0.5))) for ms in sums]
    correction = SumCorrection(points)
    asked = np.geomspace(0.1, 100, 60)
    found = [correction.whole_ms(float(ms)) for ms in asked]
    assert np.all(np.diff(found) > 0)
    assert [correction.sum_ms(ms) for ms in found] == pytest.approx(list(asked), rel=1e-4)


def test_equal_sums_are_no_error() -> None:
    correction = SumCorrection([(2.0, 2.0), (2.0, 2.4), (5.0, 5.0)])
    assert 1.9 < correction.whole_ms(2.0) < 2.5
    assert np.isfinite(correction.sum_ms(2.2))
