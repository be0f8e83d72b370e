"""SparseGPT: which weights of one matrix become zero, and what the others become. Pure, float64.

======  ===============  ==========================================================================
symbol  shape            meaning
======  ===============  ==========================================================================
r, d    scalars          rows (outputs) and columns (inputs) of W
m, n    scalars          neighbouring inputs that are zeroed together; groups in a block of columns
b       scalar           columns of a block: zeros are chosen for a whole block at once
W       [r, d]           weights, y = W x + b; those of a block are held transposed, w [b, r]
Z       [r, d]           bool, True where the weight is zero; of a block, z [b, r]
H       [d, d]           E[x xᵀ] (or its centred form) + λI, positive definite
R       [d, d]           upper triangular, RᵀR = H⁻¹; rows and columns from j on do the same for (H_≥j,≥j)⁻¹
ρ_M     scalar           ‖w_M (R_MM)⁻¹‖², the error that zeroing a group M adds if all to its right makes up for it
e_j     [r]              w_j / R_jj where zeroed, else 0; what is to the right loses e_j R_j,:
======  ===============  ==========================================================================

The sweep follows SparseGPT (Frantar and Alistarh, 2023): columns from left to right, in blocks, in each block the
weights of least ρ, over all rows together; whatever is zeroed is made up for by the weights to its right, zeroed later
or not. What is left of a column cannot react, so weights after the sweep are not the best ones for their zeros. Those
solve ``min tr((W−Ŵ) H (W−Ŵ)ᵀ)`` over the weights that are not zero, row by row: a few steps of conjugate gradients,
which cost one product with H each, come close, where a factorization for every row would not be affordable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ziplm_deploy.errors import NumericalError

Pattern = Literal["unstructured", "block4"]
GROUP_SIZES: dict[Pattern, int] = {"unstructured": 1, "block4": 4}
BLOCK_COLUMNS = 128  # a multiple of every group size
REFIT_STEPS = 30
REFIT_TOLERANCE = 5e-3  # a step that lowers the error by a smaller fraction is the last


@dataclass(frozen=True)
class SparseWeights:
    """Result for one matrix.

    ``weight``: float64 [r, d], exactly zero where ``zeros`` (bool [r, d]) is True; ``damped_error``:
    ``tr((W−Ŵ) H (W−Ŵ)ᵀ)`` of the target W under the damped H.
    """

    weight: Tensor
    zeros: Tensor
    damped_error: float


def sparsify(
    W: Tensor,
    H: Tensor,
    sparsity: float,
    *,
    pattern: Pattern = "unstructured",
    zeros: Tensor | None = None,
    target: Tensor | None = None,
    refit_steps: int = REFIT_STEPS,
) -> SparseWeights:
    """Zero ``round(sparsity · r · d)`` weights and make up for them with the others.

    With ``block4`` the number is that of the nearest whole groups. Weights in ``zeros`` count; if they alone are more
    than asked for, no others are zeroed.

    Args:
        W: [r, d] float64.
        H: [d, d] float64, damped.
        sparsity: share of zeros, above 0 and below 1.
        zeros: bool [r, d], weights that are zero already and must stay so; default: none.
        target: [r, d] float64, the weights whose outputs are to be matched; default: W.
        refit_steps: at most so many steps of conjugate gradients after the sweep; 0: the sweep alone.

    Raises:
        NumericalError: H is not positive definite, or W is not finite.
        ValueError: shapes do not match, or the sparsity is not inside (0, 1).
    """
    zeros = torch.zeros(W.shape, dtype=torch.bool) if zeros is None else zeros
    target = W if target is None else target
    _check(W, H, sparsity, zeros, target)
    R = inverse_factor(H)
    wanted = _round(sparsity * W.numel())
    swept, zeros = _sweep(W, R, zeros, wanted, GROUP_SIZES[pattern])
    weight = refit(swept, target, H, zeros, refit_steps) if refit_steps else swept
    change = target - weight  # [r, d]
    return SparseWeights(weight, zeros, float((change @ H).mul_(change).sum()))


def inverse_factor(H: Tensor) -> Tensor:
    """R, upper triangular [d, d] with RᵀR = H⁻¹; raises ``NumericalError`` if H is not positive definite.

    From the Cholesky factor of H with its order reversed, H = U Uᵀ and R = U⁻¹: H is never inverted.
    """
    lower, info = torch.linalg.cholesky_ex(H.flip(0, 1))  # [d, d]
    if int(info):
        raise NumericalError(
            f"expected a positive definite Hessian, found a failure at pivot {int(info)}; raise the relative damping"
        )
    R: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(H), dtype=H.dtype), upper=True)
    return R


def refit(weight: Tensor, target: Tensor, H: Tensor, zeros: Tensor, steps: int) -> Tensor:
    """Move the weights that are not zero towards those of least error; the error never rises.

    Conjugate gradients for every row at once, preconditioned by the diagonal of H: exact after as many steps as a row
    has weights, and good long before. All matrices are [r, d] but H [d, d]; ``zeros`` is bool.
    """
    weight, kept = weight.clone(), ~zeros
    change = target - weight
    gradient = change @ H  # [r, d]
    error = float((gradient * change).sum())
    residual = gradient.mul_(kept)
    preconditioned = residual / H.diagonal()
    direction = preconditioned.clone()
    power = (residual * preconditioned).sum(1)  # [r]
    for _ in range(steps):
        product = (direction @ H).mul_(kept)  # [r, d]
        length = _quotient(power, (direction * product).sum(1))  # [r]
        weight.addcmul_(length[:, None], direction)
        residual.addcmul_(length[:, None], product, value=-1)
        gain = float(length @ power)
        error -= gain
        if gain <= REFIT_TOLERANCE * error:
            break
        preconditioned = residual / H.diagonal()
        before, power = power, (residual * preconditioned).sum(1)
        direction.mul_(_quotient(power, before)[:, None]).add_(preconditioned)
    return weight


def _sweep(W: Tensor, R: Tensor, zeros: Tensor, wanted: int, m: int) -> tuple[Tensor, Tensor]:
    """Weights [r, d] after the sweep, and where they are zero."""
    W, zeros = W.T.contiguous().clone(), zeros.T.contiguous().clone()  # [d, r], a block is a run of rows
    free = (~zeros).sum(1).cumsum(0)  # [d] weights not zero yet, up to and with each column
    missing, done = max(0, wanted - int(zeros.sum())), 0
    for start in range(0, len(W), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(W))
        w, z, block = W[start:stop], zeros[start:stop], R[start:stop, start:stop]
        # Every block has its share of the new zeros; what whole groups left over goes to the next one.
        due = _round(missing * int(free[stop - 1]) / max(1, int(free[-1])))
        done += _choose(w, z, block, m, due - done)
        E = _eliminate(w, z, block)  # [b, r]
        W[stop:].addmm_(R[start:stop, stop:].T, E, alpha=-1)
    return W.T.contiguous(), zeros.T.contiguous()


def _choose(w: Tensor, z: Tensor, block: Tensor, m: int, due: int) -> int:
    """Mark the groups of least ρ in ``z``, in place, until about ``due`` weights are new zeros; returns how many are.

    w, z: [b, r]; block: R [b, b]. The last group is shorter if m does not divide b.
    """
    b, r = w.shape
    n = -(-b // m)
    pad = (0, 0, 0, n * m - b)
    corners = torch.eye(n * m, dtype=w.dtype)
    corners[:b, :b] = block
    corners = corners.reshape(n, m, n, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [n, m, m], R_MM
    groups = torch.nn.functional.pad(w, pad).reshape(n, m, r)
    rho = torch.linalg.solve_triangular(corners.mT, groups, upper=False).square().sum(1)  # [n, r], ‖w_M (R_MM)⁻¹‖²
    sizes = torch.nn.functional.pad(~z, pad).reshape(n, m, r).sum(1)  # [n, r] weights that would be new zeros
    order = rho.masked_fill_(sizes == 0, torch.inf).flatten().argsort(stable=True)
    ordered = sizes.flatten()[order]
    total = ordered.cumsum(0)
    count = int((2 * total - ordered < 2 * due).sum())  # the nearest to `due`
    chosen = torch.zeros(n * r, dtype=torch.bool)
    chosen[order[:count]] = True
    z |= chosen.reshape(n, 1, r).expand(n, m, r).reshape(n * m, r)[:b]
    return int(total[count - 1]) if count else 0


def _eliminate(w: Tensor, z: Tensor, block: Tensor) -> Tensor:
    """Zero the marked weights of a block, in place, compensated within the block; returns the errors e_j, [b, r]."""
    E = torch.zeros_like(w)
    for j in range(len(w)):
        E[j] = torch.where(z[j], w[j] / block[j, j], 0.0)
        w[j].masked_fill_(z[j], 0.0)
        w[j + 1 :].addr_(block[j, j + 1 :], E[j], alpha=-1)
    return E


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is: a row that is solved, or has no weights left."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _check(W: Tensor, H: Tensor, sparsity: float, zeros: Tensor, target: Tensor) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"expected a sparsity above 0 and below 1, found {sparsity}")
    d = W.shape[1]
    if H.shape != (d, d) or zeros.shape != W.shape or target.shape != W.shape:
        raise ValueError(
            f"expected H [{d}, {d}] and zeros and target {list(W.shape)} for W {list(W.shape)}, found "
            f"{list(H.shape)}, {list(zeros.shape)} and {list(target.shape)}"
        )
    if not bool(torch.isfinite(W).all()) or not bool(torch.isfinite(target).all()):
        raise NumericalError("expected finite weights, found NaN or infinity; check the checkpoint")
