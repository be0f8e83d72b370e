"""SPDY: the level of every module that costs least under a latency budget. Pure: arrays in, arrays out.

======  ==============  ========================================================================
symbol  shape           meaning
======  ==============  ========================================================================
L, S_l  scalars         modules; levels of module l
t       L × [S_l]       milliseconds of a level, measured
e       L × [S_l]       cost of a level: relative error, or measured loss
B       scalar          milliseconds that all modules together may take
K       scalar          buckets that B is divided into; δ = B/K
τ       L × [S_l]       ceil(t/δ): rounding up keeps Σ t ≤ B, at most L of K buckets are lost
D       [K+1]           least cost of the modules so far within k buckets (ALGORITHM, SPDY)
======  ==============  ========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class InfeasibleBudgetError(ValueError):
    """Even the fastest level of every module does not fit the budget."""


def solve(t: Sequence[Array], e: Sequence[Array], B: float, K: int = 10_000) -> list[int]:
    """Choose one level a module so that Σ t ≤ B and Σ e is least (up to the rounding of t to buckets).

    Args:
        t: per module, milliseconds of its levels, each [S_l].
        e: per module, cost of its levels, each [S_l]; finite.
        B: budget in milliseconds.
        K: number of buckets.

    Returns:
        Index of the chosen level, one a module.

    Raises:
        InfeasibleBudgetError: no choice fits.
    """
    if sum(float(np.min(levels)) for levels in t) > B or B <= 0:
        raise InfeasibleBudgetError(f"the fastest levels take longer than the budget of {B:.4g} ms")
    delta = B / K
    D = np.zeros(K + 1)  # [K+1]
    choices = np.zeros((len(t), K + 1), dtype=np.int16)  # [L, K+1]
    taus = [np.ceil(levels / delta - 1e-9).astype(np.int64) for levels in t]
    better = np.empty(K + 1, dtype=bool)
    for module, (tau, cost) in enumerate(zip(taus, e, strict=True)):
        best = np.full(K + 1, np.inf)
        for level in range(len(tau)):
            shift = int(tau[level])
            if shift > K:
                continue
            candidate = D[: K + 1 - shift] + cost[level]
            mask = better[: K + 1 - shift]
            np.less(candidate, best[shift:], out=mask)
            np.copyto(best[shift:], candidate, where=mask)
            np.copyto(choices[module, shift:], level, where=mask)
        D = best
    if not np.isfinite(D[K]):  # every level fits in milliseconds, but not after rounding up
        raise InfeasibleBudgetError(f"the fastest levels fill more than {K} buckets of {delta:.3g} ms")
    return _trace(choices, taus, K)


def _trace(choices: NDArray[np.int16], taus: Sequence[NDArray[np.int64]], K: int) -> list[int]:
    levels = [0] * len(taus)
    k = K
    for module in range(len(taus) - 1, -1, -1):
        levels[module] = int(choices[module, k])
        k -= int(taus[module][levels[module]])
    return levels
