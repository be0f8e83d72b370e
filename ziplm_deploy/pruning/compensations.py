"""Weights of what is kept: by OBS in closed form, or as they are, with or without the mean output of what is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.pruning.kernels import obs
from ziplm_deploy.pruning.methods.base import Levels, OutputLinear, relative_error
from ziplm_deploy.recipe import PruneConfig

# Few tokens leave most directions of a Hessian unseen: with 500 tokens for 1,536 columns a damping of 0.01 lost two to
# three points of STS-B Spearman against 0.1. From 3 d tokens on this adds nothing to the default.
SMALL_SAMPLE_DAMPING = 0.03


# Order in which structures leave, int64 [n], for (H, W, group size, smallest number that is kept).
OrderOf = Callable[[Tensor, Tensor, int, int], Tensor]


def exact_order(H: Tensor, W: Tensor, group_size: int, least: int) -> Tensor:
    """One at a time, by exact scores."""
    return obs.removal_order(H, W, group_size)[0]


def obs_levels(
    linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, order_of: OrderOf = exact_order
) -> tuple[Levels, float]:
    """Levels by OBS, and the relative damping that was used; order and weights in one (ALGORITHM, OBS)."""
    if not sizes:
        return {}, prune.damping
    W, b, moments, m = linear.weighted(linear.weight), linear.bias, linear.moments, linear.group_size
    damping = max(prune.damping, SMALL_SAMPLE_DAMPING * W.shape[1] / moments.n_tokens)
    power = linear.output_power
    moment = moments.moment(prune.centred)  # [d, d]
    live = moment.diagonal() != 0
    mean_diagonal = float(moment.diagonal()[live].mean()) if bool(live.any()) else 1.0
    H, damping_used, _ = obs.damp(moment, damping)
    del moment  # as large as all weights together
    W_live = W * live  # a dead column carries nothing that varies: its weight is dropped, its mean goes to the bias
    order = order_of(H, W_live, m, min(sizes))
    levels: Levels = {}
    for level in obs.level_weights(H, W_live, order, sizes):
        columns = linear.columns(level.kept)  # [k]
        change = W_live.clone()
        change[:, columns] -= level.weight
        # the level minimizes tr(Δ(M + λI)Δᵀ), the error is tr(ΔMΔᵀ)
        error = level.damped_error - damping_used * float(change.square().sum())
        weight, new_bias = linear.unweighted(level.weight), b
        if prune.centred:
            new_bias = b + linear.weight @ moments.mean - weight @ moments.mean[columns]
        relative = relative_error(error, power)
        levels[level.size] = LevelWeights(level.kept, weight.float().contiguous(), new_bias.float(), relative)
    return levels, damping_used / mean_diagonal


def masked_levels(linear: OutputLinear, scores: Tensor, sizes: Sequence[int], *, moves_mean: bool) -> Levels:
    """Levels that keep the best-scored structures with their dense weights.

    ``scores``: [n]; sizes: in 1..n. ``moves_mean`` adds the mean output of what was removed to the bias.
    """
    W, b, moments = linear.weight, linear.bias, linear.moments
    survivors = scores.argsort(descending=True, stable=True)  # [n]
    columns = linear.columns(survivors)  # [d]
    moment = moments.moment(moves_mean)
    removal_error = _trailing_sums((W.T @ W * moment)[columns][:, columns])  # [d + 1]
    power = linear.output_power
    levels: Levels = {}
    for size in sizes:
        kept = survivors[:size].sort().values
        here = linear.columns(kept)  # [k]
        bias = b + W @ moments.mean - W[:, here] @ moments.mean[here] if moves_mean else b
        relative = relative_error(float(removal_error[size * linear.group_size]), power)
        levels[size] = LevelWeights(kept, W[:, here].float().contiguous(), bias.float(), relative)
    return levels


def dropped_level(linear: OutputLinear, *, moves_mean: bool) -> LevelWeights:
    """Size 0: the mean output as bias, or nothing at all, which is an error of exactly 1."""
    r = linear.weight.shape[0]
    kept, weight = torch.zeros(0, dtype=torch.int64), torch.zeros(r, 0)
    if not moves_mean:
        return LevelWeights(kept, weight, torch.zeros(r), 1.0)
    shift = linear.bias + linear.weight @ linear.moments.mean
    power = linear.output_power
    remaining = power - float(linear.weighted(shift).square().sum())  # E‖Lᵀ(y − E y)‖²
    return LevelWeights(kept, weight, shift.float(), relative_error(remaining, power))


def _trailing_sums(matrix: Tensor) -> Tensor:
    """Σ of the block [k:, k:] for every k in 0..d: [d, d] → [d + 1]."""
    d = matrix.shape[0]
    # A block grows by its new row and column: both are sums to the right of the diagonal.
    right = matrix.flip(1).cumsum(1).flip(1).diagonal() * 2 - matrix.diagonal()  # [d]
    sums = torch.zeros(d + 1, dtype=matrix.dtype)
    sums[:d] = right.flip(0).cumsum(0).flip(0)
    return sums
