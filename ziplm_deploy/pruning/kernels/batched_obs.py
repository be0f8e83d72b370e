"""Batched greedy OBS: several groups leave in a round, scored by diagonals of Cholesky factors. Pure, float64.

After SlimGPT (Ling et al., NeurIPS 2024; ALGORITHM, SlimGPT).

======  ===============  ==========================================================================
symbol  shape            meaning
======  ===============  ==========================================================================
r, d    scalars          rows (outputs) and columns (inputs) of W
m, n    scalars          columns of a group, and number of groups, d = n·m
W       [r, d]           weights of the output linear, compensated for what is gone
H       [d, d]           E[x xᵀ] (or its centred form) + λI, positive definite
G       [d, d]           H⁻¹ restricted to what is left: H_KK⁻¹
M, K    index sets       columns of one group, or of all that leave in a round; columns that are left
L_M     [m, m]           lower Cholesky factor of G_MM
ε_M     scalar           ½ Σ_j ‖W_:j‖² / (L_M)_jj²: the error of removing M column by column, each with the
                         weights that it has before; ρ_M of exact OBS where m = 1
T, g    scalars          columns to remove, and how many leave in the next round
======  ===============  ==========================================================================

What a round removes is compensated exactly, as by a sweep over the columns: G and W lose G_KM (G_MM)⁻¹ G_MK and
W_M (G_MM)⁻¹ G_MK. Only the choice of what goes is approximate, since correlations inside of a round are not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ziplm_deploy.pruning.kernels.obs import check_factor, group_columns, inverse

FIRST_SPARED = 512  # columns of T that do not count towards the size of a round
MIN_ROUND, MAX_ROUND = 64, 1024


def round_sizes(T: int) -> list[int]:
    """How many of ``T`` single columns leave in each round, fewer as it goes on: the dynamic group size.

    ``g = (T − 512) // 2`` at first, then ``(g − 512) // 2``; each round removes ``min(left, max(g, 64), 1024)``.
    """
    sizes: list[int] = []
    left, g = T, (T - FIRST_SPARED) // 2
    while left:
        sizes.append(min(left, max(g, MIN_ROUND), MAX_ROUND))
        left, g = left - sizes[-1], (g - FIRST_SPARED) // 2
    return sizes


def batched_order(H: Tensor, W: Tensor, group_size: int, rounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Remove the groups with the least ε, ``rounds[i]`` of them at a time, with errors renewed after each round.

    Args:
        H: [d, d] float64, damped.
        W: [r, d] float64.
        group_size: m, divides d.
        rounds: groups that leave in each round, together at most n.

    Returns:
        order int64 [n], first removed first, and what stays at the end, ascending; scores float64, the ε of each
        removed group when it left.

    Raises:
        NumericalError: H is not positive definite.
    """
    d, m = H.shape[0], group_size
    if W.shape[1] != d or d % m:
        raise ValueError(f"expected W [r, {d}] and a group size that divides {d}, found {tuple(W.shape)}, {m}")
    if min(rounds, default=1) < 1 or sum(rounds) > d // m:
        raise ValueError(f"expected rounds of together at most {d // m} groups, found {list(rounds)}")
    G = inverse(H)
    groups = torch.arange(d // m)  # original index of the group at each place
    order: list[Tensor] = []
    scores = [torch.zeros(0, dtype=torch.float64)]
    for size in rounds:
        errors = _errors(G, W, m)  # [k]
        places = errors.argsort(stable=True)[:size]
        order.append(groups[places])
        scores.append(errors[places])
        left = torch.ones(len(groups), dtype=torch.bool)
        left[places] = False
        stay = left.nonzero().flatten()
        G, W = _removed(G, W, group_columns(places, m), group_columns(stay, m))
        groups = groups[stay]
    return torch.cat([*order, groups]), torch.cat(scores)


def _errors(G: Tensor, W: Tensor, m: int) -> Tensor:
    """ε of every group that is left, [k]."""
    k = G.shape[0] // m
    blocks = G.reshape(k, m, k, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [k, m, m]
    factors, info = torch.linalg.cholesky_ex(blocks)
    check_factor(int(info.max()) if k else 0)
    pivots = factors.diagonal(dim1=1, dim2=2).square()  # [k, m]
    column_power = W.square().sum(0).reshape(k, m)
    errors: Tensor = 0.5 * (column_power / pivots).sum(1)
    return errors


def _removed(G: Tensor, W: Tensor, M: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """G and W without the columns M: [|K|, |K|] and [r, |K|], both compensated."""
    if not len(K):
        return G[K][:, K], W[:, K]
    factor, info = torch.linalg.cholesky_ex(G[M][:, M])  # [|M|, |M|]
    check_factor(int(info))
    u = torch.linalg.solve_triangular(factor, G[M][:, K], upper=False)  # [|M|, |K|]
    v = torch.linalg.solve_triangular(factor.T, u, upper=True)  # [|M|, |K|]; (G_MM)⁻¹ G_MK
    return torch.addmm(G[K][:, K], u.T, u, alpha=-1), torch.addmm(W[:, K], W[:, M], v, alpha=-1)
