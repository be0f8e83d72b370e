"""Calibration statistics of the inputs of one output linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ziplm_deploy.errors import DataError, NumericalError


def moments_bytes(widths: Sequence[int]) -> int:
    """Peak bytes of :class:`Moments` of so many inputs: float64 sums, one float32 product, its float64 copy."""
    return sum(8 * d * d + 16 * d for d in widths) + 12 * max(widths, default=0) ** 2


class Moments:
    """Running sums over tokens of what enters ``name``: float32 products a batch, carried in float64.

    Inputs are shifted by the mean of the first batch before they are multiplied: float32 rounding then stays relative
    to the spread of a column, not to its mean, and the centred Hessian keeps its digits.
    """

    def __init__(self, name: str, d: int) -> None:
        self.name = name
        self.products = torch.zeros(d, d, dtype=torch.float64)  # Σ (x−c)(x−c)ᵀ
        self.sums = torch.zeros(d, dtype=torch.float64)  # Σ (x−c)
        self.shift: Tensor | None = None  # c, float32 [d]
        self.n_tokens = 0

    def add(self, x: Tensor) -> None:
        """Count the inputs x, float [N, d], of N more tokens."""
        if not len(x):
            return
        x = x.float()
        if self.shift is None:
            self.shift = x.mean(0)
        x = x - self.shift  # [N, d]
        sums = x.sum(0, dtype=torch.float64)
        product = x.T @ x  # [d, d]
        if not bool(torch.isfinite(sums).all()) or not bool(torch.isfinite(product.diagonal()).all()):
            raise NumericalError(
                f"expected finite inputs of {self.name}, found NaN or infinity; check the checkpoint and the data"
            )
        self.products += product
        self.sums += sums
        self.n_tokens += len(x)

    def finish(self) -> InputMoments:
        """Undo the shift, in float64 and in place."""
        if self.shift is None:
            raise DataError(
                f"expected calibration tokens in {self.name}, found none: every token is padding, or there is no data"
            )
        shift = self.shift.double()
        rest = self.sums / self.n_tokens  # E[x−c]
        mean = shift + rest
        # E[xxᵀ] = E[(x−c)(x−c)ᵀ] + c E[x−c]ᵀ + μ cᵀ
        self.products.div_(self.n_tokens).addr_(shift, rest).addr_(mean, shift)
        return InputMoments(self.products, mean, self.n_tokens)


DEAD_VARIANCE = 1e-10  # of a column's second moment: below it, a centred column is constant up to rounding


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of the inputs x of one module over its calibration tokens.

    ``hessian``: float64 [d, d], ``E[x xᵀ]``, neither centred nor damped; ``mean``: float64 [d]; ``n_tokens``: tokens
    counted, padding excluded.
    """

    hessian: Tensor
    mean: Tensor
    n_tokens: int

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.hessian.shape != (d, d):
            raise ValueError(
                f"expected hessian [d, d] and mean [d], found {tuple(self.hessian.shape)}, {tuple(self.mean.shape)}"
            )
        if self.hessian.dtype != torch.float64 or self.mean.dtype != torch.float64:
            raise ValueError(f"expected float64 moments, found {self.hessian.dtype}, {self.mean.dtype}")

    def restricted(self, kept: list[int], group_size: int) -> InputMoments:
        """Moments of the inputs of some structures (groups of ``group_size`` columns) alone."""
        columns = (torch.tensor(kept)[:, None] * group_size + torch.arange(group_size)).flatten()  # [k]
        return InputMoments(self.hessian[columns][:, columns], self.mean[columns], self.n_tokens)

    def covariance(self) -> Tensor:
        """``E[(x−μ)(x−μ)ᵀ]``, [d, d]; rows and columns of inputs that never vary are exactly zero."""
        covariance = self.hessian - torch.outer(self.mean, self.mean)
        variance = covariance.diagonal()
        constant = variance <= DEAD_VARIANCE * self.hessian.diagonal()
        covariance[constant] = 0
        covariance[:, constant] = 0
        return covariance

    def moment(self, centred: bool) -> Tensor:
        """The covariance, or the plain second moment; [d, d], a copy."""
        return self.covariance() if centred else self.hessian.clone()
