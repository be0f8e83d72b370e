"""Baselines behind the interface of the database: which columns to keep without a Hessian, and how far off that is.

Weights are never updated; only FLAP compensates the bias. Plans for these methods are in ``baseline_plans.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ziplm_deploy.pruning.levels import LevelWeights
from ziplm_deploy.pruning.statistics import ModuleStats

MASKING_METHODS = ("magnitude", "random", "flap")


def structure_scores(method: str, W: Tensor, stats: ModuleStats, group_size: int, seed: int = 0) -> Tensor:
    """Importance of every structure, float64 [n]; the lowest go first.

    ``magnitude``: ‖W_M‖ (Frobenius); ``flap``: Σ_{j∈M} Var(x_j)·‖W_:j‖² (ALGORITHM, cheap baselines); ``random``:
    uniform in [0, 1) from ``seed``.

    Raises:
        ValueError: another method.
    """
    n = W.shape[1] // group_size
    column_power = W.double().square().sum(0)  # [d]
    if method == "magnitude":
        return column_power.reshape(n, group_size).sum(1).sqrt()
    if method == "flap":
        variance = (stats.hessian.diagonal() - stats.mean.square()).clamp(min=0)
        return (variance * column_power).reshape(n, group_size).sum(1)
    if method == "random":
        return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raise ValueError(f"expected a method of {', '.join(MASKING_METHODS)}, found {method!r}")


def masked_levels(
    method: str, W: Tensor, b: Tensor, stats: ModuleStats, group_size: int, sizes: Sequence[int], seed: int = 0
) -> dict[int, LevelWeights]:
    """Levels that keep the best-scored structures with their dense weights.

    W: float64 [r, d]; b: float64 [r]; sizes: in 1..n. FLAP adds the mean output of what was removed to the bias.
    """
    scores = structure_scores(method, W, stats, group_size, seed)
    compensated = method == "flap"
    survivors = scores.argsort(descending=True, stable=True)  # [n]
    columns = _columns(survivors, group_size)  # [d]
    moment = stats.moment(compensated)
    removal_error = _trailing_sums((W.T @ W * moment)[columns][:, columns])  # [d + 1]
    power = output_power(W, b, stats)
    levels: dict[int, LevelWeights] = {}
    for size in sizes:
        kept = survivors[:size].sort().values
        here = _columns(kept, group_size)  # [k]
        bias = b + W @ stats.mean - W[:, here] @ stats.mean[here] if compensated else b
        relative = ratio(float(removal_error[size * group_size]), power)
        levels[size] = LevelWeights(kept, W[:, here].float().contiguous(), bias.float(), relative)
    return levels


def output_power(W: Tensor, b: Tensor, stats: ModuleStats) -> float:
    """``E‖W x + b‖²``."""
    cross = 2 * torch.dot(b, W @ stats.mean) + b.square().sum()
    return float(((W @ stats.hessian) * W).sum() + cross)


def ratio(error: float, power: float) -> float:
    """Error over power, at least 0; a module that outputs nothing loses nothing."""
    return max(error, 0.0) / power if power > 0 else 0.0


def _trailing_sums(matrix: Tensor) -> Tensor:
    """Σ of the block [k:, k:] for every k in 0..d: [d, d] → [d + 1]."""
    d = matrix.shape[0]
    # A block grows by its new row and column: both are sums to the right of the diagonal.
    right = matrix.flip(1).cumsum(1).flip(1).diagonal() * 2 - matrix.diagonal()  # [d]
    sums = torch.zeros(d + 1, dtype=matrix.dtype)
    sums[:d] = right.flip(0).cumsum(0).flip(0)
    return sums


def _columns(groups: Tensor, group_size: int) -> Tensor:
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten()
