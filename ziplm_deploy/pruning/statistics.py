"""Calibration statistics of the inputs of one output linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEAD_VARIANCE = 1e-10  # of a column's second moment: below it, a centred column is constant up to rounding


@dataclass(frozen=True)
class ModuleStats:
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

    def restricted(self, kept: list[int], group_size: int) -> ModuleStats:
        """Moments of the inputs of some structures (groups of ``group_size`` columns) alone."""
        columns = (torch.tensor(kept)[:, None] * group_size + torch.arange(group_size)).flatten()  # [k]
        return ModuleStats(self.hessian[columns][:, columns], self.mean[columns], self.n_tokens)

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
