"""Correction of the sum of a model's parts to what the whole model takes, as measured on a few whole models.

A cell is timed in a stack of equal layers. Where four of them stay in a cache that a whole model leaves, as INT8 layers
of a small model do, sums of cells promise too much, most for medium sizes. Some whole models are therefore timed along
with the cells, each in processes of its own. log(measured/sum) is smooth over log(sum), but what one model shows of it
is not: where its processes lie in memory, and a disturbed machine, shift it by 1 to 3 %. So a Gaussian process is put
through what was measured (Rasmussen & Williams 2006, equation 2.23, with an unknown mean); outside it is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ziplm_deploy.latency.statistics import Floats

REFERENCE_ERROR = 0.005  # standard error of log(measured/sum) of the dense model, which is timed most, and of the base
WHOLE_ERROR = 0.015  # of a pruned whole model
CURVE_SD = 0.06  # of the smooth curve about its mean
CURVE_LENGTH = 1.0  # over which it changes: models e times as slow
KNOTS = 65


class SumCorrection:
    """A strictly rising map from sums of parts to milliseconds of whole models, and back; without points it is y = x.

    ``points``: (sum of the parts, measured) in milliseconds, and the standard error of their log ratio, of each whole
    model, in any order.
    """

    def __init__(self, points: Sequence[tuple[float, float, float]]) -> None:
        sums, wholes, errors = np.array(sorted(points or [(1.0, 1.0, REFERENCE_ERROR)])).T  # [n] each
        low, high = np.log([sums.min(), sums.max()])
        self._sum = np.linspace(low, high, KNOTS if low < high else 1)
        whole = self._sum + _smoothed(np.log(sums), np.log(wholes / sums), errors, self._sum)
        # Noise must not make a larger sum the faster model: the map has to be invertible.
        self._whole = np.maximum.accumulate(whole) + 1e-9 * np.arange(len(whole))

    def whole_ms(self, sum_ms: float) -> float:
        """Milliseconds of a model whose parts sum up to ``sum_ms``."""
        return _map(sum_ms, self._sum, self._whole)

    def sum_ms(self, whole_ms: float) -> float:
        """What the parts of a model may sum up to so that it takes ``whole_ms``."""
        return _map(whole_ms, self._whole, self._sum)


def _smoothed(place: Floats, value: Floats, error: Floats, asked: Floats) -> Floats:
    """Mean of a Gaussian process at ``asked`` [m], given ``value`` [n] at ``place`` [n] with standard errors."""
    inverse = np.linalg.inv(_covariance(place, place) + np.diag(error**2)).astype(np.float64)
    mean = float((inverse @ value).sum() / inverse.sum())
    smoothed: Floats = mean + _covariance(asked, place) @ inverse @ (value - mean)
    return smoothed


def _covariance(first: Floats, second: Floats) -> Floats:
    return CURVE_SD**2 * np.exp(-(((first[:, None] - second) / CURVE_LENGTH) ** 2) / 2)


def _map(ms: float, start: Floats, end: Floats) -> float:
    inside = np.clip(np.log(ms), start[0], start[-1])
    return ms * float(np.exp(np.interp(inside, start, end) - inside))
