"""Optimal brain surgeon on column groups: the removal order, and the best weights of every level. Pure, float64.

======  ===============  ==========================================================================
symbol  shape            meaning
======  ===============  ==========================================================================
r, d    scalars          rows (outputs) and columns (inputs) of W
m, n    scalars          columns of a group (head_dim, or 1 in an FFN); number of groups, d = n·m
W       [r, d]           weights of the output linear, y = W x + b
H       [d, d]           E[x xᵀ] (or its centred form) + λI, positive definite
G       [d, d]           H⁻¹ restricted to what is left: H_KK⁻¹
S       [d, d]           Wᵀ W of the current, compensated weights
M, K, P index sets       the group being removed; kept columns; removed columns
ρ_M     scalar           ½ tr(W_M (G_MM)⁻¹ W_Mᵀ) = ½ ⟨S_MM, (G_MM)⁻¹⟩, the error that removing M adds
U       [p, d]           panel: L⁻¹ G_{M,:} with L Lᵀ = G_MM; G has lost UᵀU since the last flush
V       [p, d]           panel: (G_MM)⁻¹ G_{M,:}; the weights lose W_M V
Q       [p, d]           panel: S_{M,:} − ½ S_MM V; S has lost VᵀQ + QᵀV since the last flush
======  ===============  ==========================================================================

The order needs only G and S (ALGORITHM, OBS, third oracle). Rank-one changes are held back in a panel and applied by
one matrix product, since applying each costs a pass through d² memory. Weights follow from the closed form
``W_K = W H_{:,K} (H_KK)⁻¹``: kept sets are nested, so one Cholesky factor of the permuted H serves every level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplm_deploy.errors import NumericalError

PANEL_ROWS = 64
DAMPING_FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0)  # the schedule: relative damping is multiplied by these in turn


@dataclass(frozen=True)
class Level:
    """Best weights for the kept groups.

    ``kept``: int64 [k] groups, ascending; ``weight``: float64 [r, k·m], columns in that order; ``damped_error``:
    ``tr((W−Ŵ) H (W−Ŵ)ᵀ)`` under the damped H, twice the E of ALGORITHM.
    """

    size: int
    kept: Tensor
    weight: Tensor
    damped_error: float


def damp(H: Tensor, relative: float) -> tuple[Tensor, float, list[float]]:
    """Add ``λI`` with λ = relative · mean diagonal, raised on :data:`DAMPING_FACTORS` until H factorizes.

    Args:
        H: [d, d] symmetric, not changed. Dead columns (zero diagonal) get the diagonal 1: their weights must be zero.
        relative: damping over the mean diagonal of the live columns.

    Returns:
        The damped copy, the λ used, and every λ tried in turn.

    Raises:
        NumericalError: H is not finite, or no damping of the schedule makes it positive definite.
    """
    if not bool(torch.isfinite(H).all()):
        raise NumericalError("expected a finite Hessian, found NaN or infinity; check the calibration activations")
    live = H.diagonal() != 0
    mean = float(H.diagonal()[live].mean()) if bool(live.any()) else 0.0
    tried: list[float] = []
    for factor in DAMPING_FACTORS:
        damping = relative * factor * mean
        tried.append(damping)
        damped = H.clone()
        damped.diagonal().copy_(torch.where(live, H.diagonal() + damping, 1.0))
        if int(torch.linalg.cholesky_ex(damped).info) == 0:
            return damped, damping, tried
    raise NumericalError(
        f"expected a positive definite Hessian, found none at the dampings {', '.join(f'{x:.3g}' for x in tried)}; "
        "use more calibration data or raise prune.damping"
    )


def removal_order(H: Tensor, W: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Remove groups one at a time, the one with the least ρ first, until none is left (ALGORITHM, OBS).

    Args:
        H: [d, d] float64, damped.
        W: [r, d] float64.
        group_size: m, divides d.

    Returns:
        order int64 [n], first removed first; step scores float64 [n], whose sum is ``½ tr(W H Wᵀ)``.

    Raises:
        NumericalError: H is not positive definite.
    """
    d = H.shape[0]
    if W.shape[1] != d or d % group_size:
        raise ValueError(f"expected W [r, {d}] and a group size that divides {d}, found {tuple(W.shape)}, {group_size}")
    G = inverse(H)
    S = W.T @ W  # [d, d]
    return _Elimination(G, S, group_size).run()


def level_weights(H: Tensor, W: Tensor, order: Tensor, sizes: Sequence[int]) -> Iterator[Level]:
    """Yield the closed-form weights of each level, in the order of ``sizes``.

    Args:
        H: [d, d] float64, damped.
        W: [r, d] float64.
        order: int64 [n] from :func:`removal_order`; the level of size k keeps its last k groups.
        sizes: numbers of kept groups, each in 0..n.

    Raises:
        NumericalError: H is not positive definite.
    """
    (r, d), n = W.shape, len(order)
    m = d // n
    if any(not 0 <= size <= n for size in sizes):
        raise ValueError(f"expected sizes in 0..{n}, found {list(sizes)}")
    survivors = order.flip(0)  # the longest kept first: every kept set is a leading part
    columns = group_columns(survivors, m)  # [d]
    factor, info = torch.linalg.cholesky_ex(H[columns][:, columns])  # [d, d] lower
    check_factor(int(info))
    Y = W[:, columns] @ factor  # [r, d]; W H_{:,K} (H_KK)⁻¹ = Y_K L_KK⁻¹
    power = Y.square().sum(0).flip(0).cumsum(0).flip(0)  # [d]; the error of keeping k columns is Σ_{j≥k} ‖Y_:j‖²
    for size in sizes:
        k = size * m
        kept, rank = survivors[:size].sort()
        solved = torch.linalg.solve_triangular(factor[:k, :k], Y[:, :k], upper=False, left=False)  # [r, k]
        weight = solved.reshape(r, size, m)[:, rank].reshape(r, k)
        yield Level(size, kept, weight, float(power[k]) if k < d else 0.0)


class _Elimination:
    """State of the greedy pass. The active groups occupy a leading part of G and S, compacted at every flush."""

    def __init__(self, G: Tensor, S: Tensor, m: int) -> None:
        self.m, self.n = m, G.shape[0] // m
        self.G, self.S = G, S
        rows = max(PANEL_ROWS, m) // m * m
        self.U, self.V, self.Q = (torch.empty(rows, G.shape[0], dtype=G.dtype) for _ in range(3))
        self.used = 0
        self.groups = torch.arange(self.n)  # original index of the group at each place
        self.removed = torch.zeros(self.n, dtype=torch.bool)
        # Diagonal blocks are kept explicitly [n, m, m], so that scores never wait for a flush.
        self.G_blocks, self.S_blocks = _diagonal_blocks(G, m), _diagonal_blocks(S, m)

    def run(self) -> tuple[Tensor, Tensor]:
        order: list[int] = []
        scores: list[float] = []
        all_threads = torch.get_num_threads()
        # Steps are short: on a busy machine two threads waiting for each other made them six times slower.
        with _threads(1):
            for _ in range(self.n):
                rho = self._scores()
                place = int(rho.argmin())
                order.append(int(self.groups[place]))
                scores.append(float(rho[place]))
                self._remove(place)
                if self.used == self.U.shape[0]:
                    with _threads(all_threads):
                        self._flush()
        return torch.tensor(order, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64)

    def _scores(self) -> Tensor:
        """ρ of every place, [n]; infinite where removed."""
        if self.m == 1:
            rho = self.S_blocks[:, 0, 0] / self.G_blocks[:, 0, 0]
        else:
            solved = torch.cholesky_solve(self.S_blocks, torch.linalg.cholesky(self.G_blocks))
            rho = solved.diagonal(dim1=1, dim2=2).sum(1)
        return rho.mul_(0.5).clamp_(min=0).masked_fill_(self.removed, torch.inf)

    def _remove(self, place: int) -> None:
        m, used, d = self.m, self.used, self.n * self.m
        M = slice(place * m, (place + 1) * m)
        U, V, Q = self.U[:used, :d], self.V[:used, :d], self.Q[:used, :d]  # [used, d]
        g = self.G[M, :d] - U[:, M].T @ U  # [m, d]
        s = self.S[M, :d] - V[:, M].T @ Q - Q[:, M].T @ V  # [m, d]
        factor, info = torch.linalg.cholesky_ex(g[:, M])  # [m, m]
        check_factor(int(info))
        u = torch.linalg.solve_triangular(factor, g, upper=False)  # [m, d]
        v = torch.linalg.solve_triangular(factor.T, u, upper=True)  # [m, d]
        q = s.addmm_(s[:, M].clone(), v, alpha=-0.5)  # [m, d]
        self.G_blocks -= _block_products(u, u, m)
        cross = _block_products(v, q, m)
        self.S_blocks -= cross + cross.transpose(1, 2)
        self.G_blocks[place] = torch.eye(m, dtype=g.dtype)  # factorizes; the place is masked by `removed`
        self.removed[place] = True
        for panel, rows in ((self.U, u), (self.V, v), (self.Q, q)):
            panel[used : used + m, :d] = rows
        self.used += m

    def _flush(self) -> None:
        """Apply the panel, then move the active groups of the tail into the holes before it."""
        d = self.n * self.m
        U, V, Q = self.U[: self.used, :d], self.V[: self.used, :d], self.Q[: self.used, :d]
        self.G[:d, :d].addmm_(U.T, U, alpha=-1)
        self.S[:d, :d].addmm_(V.T, Q, alpha=-1).addmm_(Q.T, V, alpha=-1)
        left = self.n - int(self.removed.sum())
        holes = self.removed[:left].nonzero().flatten()
        movers = left + (~self.removed[left:]).nonzero().flatten()
        to, source = group_columns(holes, self.m), group_columns(movers, self.m)
        for matrix in (self.G, self.S):
            matrix[to, :d] = matrix[source, :d]
            matrix[:d, to] = matrix[:d, source]
        for blocks in (self.G_blocks, self.S_blocks, self.groups):
            blocks[holes] = blocks[movers]
        self.n, self.used = left, 0
        self.G_blocks, self.S_blocks, self.groups = self.G_blocks[:left], self.S_blocks[:left], self.groups[:left]
        self.removed = torch.zeros(left, dtype=torch.bool)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _block_products(a: Tensor, b: Tensor, m: int) -> Tensor:
    """Diagonal blocks of aᵀb: a, b [m, n·m] → [n, m, m]."""
    if m == 1:
        return (a * b).reshape(-1, 1, 1)
    n = a.shape[1] // m
    return torch.bmm(a.reshape(m, n, m).permute(1, 2, 0), b.reshape(m, n, m).permute(1, 0, 2))


def _diagonal_blocks(matrix: Tensor, m: int) -> Tensor:
    """[n·m, n·m] → copies of the diagonal blocks [n, m, m]."""
    n = matrix.shape[0] // m
    return matrix.reshape(n, m, n, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def group_columns(groups: Tensor, m: int) -> Tensor:
    """Column indices of groups: [k] → [k·m]."""
    return (groups[:, None] * m + torch.arange(m)).flatten()


def inverse(H: Tensor) -> Tensor:
    """Inverse of a positive definite matrix; raises ``NumericalError`` for another."""
    factor, info = torch.linalg.cholesky_ex(H)
    check_factor(int(info))
    return torch.cholesky_inverse(factor)


def check_factor(info: int) -> None:
    """Raise ``NumericalError`` where ``cholesky_ex`` says that a factorization failed."""
    if info:
        raise NumericalError(
            f"expected a positive definite matrix, found a failure at pivot {info}; raise prune.damping"
        )
