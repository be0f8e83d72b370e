"""Correction of the sum of a model's parts to what the whole model takes, as measured on a few whole models.

A cell is timed in a stack of equal layers. Where four of them stay in a cache that a whole model leaves, as INT8 layers
of a small model do, sums of cells promise too much, most for medium sizes. Some whole models are therefore timed along
with the cells, each in a process of its own; between them log(measured/sum) is interpolated over log(sum), outside of
them it is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ziplm_deploy.latency.statistics import Floats


class SumCorrection:
    """A strictly rising map from sums of parts to milliseconds of whole models, and back; without points it is y = x.

    ``points``: (sum of the parts, measured) of each whole model, in milliseconds, in any order.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        known = np.log(np.array(sorted(points or [(1.0, 1.0)])))  # [n, 2]
        self._sum = known[:, 0]
        # Noise must not make a larger sum the faster model: the map has to be invertible.
        self._whole = np.maximum.accumulate(known[:, 1]) + 1e-9 * np.arange(len(known))

    def whole_ms(self, sum_ms: float) -> float:
        """Milliseconds of a model whose parts sum up to ``sum_ms``."""
        return _map(sum_ms, self._sum, self._whole)

    def sum_ms(self, whole_ms: float) -> float:
        """What the parts of a model may sum up to so that it takes ``whole_ms``."""
        return _map(whole_ms, self._whole, self._sum)


def _map(ms: float, start: Floats, end: Floats) -> float:
    inside = np.clip(np.log(ms), start[0], start[-1])
    return ms * float(np.exp(np.interp(inside, start, end) - inside))
