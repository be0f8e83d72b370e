"""What a pruning method decides: which structures go first, what the rest weighs then, and every module's level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ziplm_deploy.errors import NumericalError
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.search.search import Loss
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.recipe import PruneConfig

Levels = dict[int, LevelWeights]


@dataclass(frozen=True)
class OutputLinear:
    """The output linear of one module, the moments of what enters it, and what its output is worth.

    Errors are ``E‖Lᵀ(y − ŷ)‖²``, relative ones over ``E‖Lᵀy‖²``, with ``L Lᵀ`` the Fisher information at the output;
    without it L is the identity.
    """

    weight: Tensor  # W, float64 [r, d]
    bias: Tensor  # b, float64 [r]
    moments: InputMoments
    group_size: int  # columns that leave with one structure
    factor: Tensor | None = None  # L, float64 [r, r] lower

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        moments: InputMoments,
        group_size: int,
        fisher: Tensor | None = None,
    ) -> OutputLinear:
        """A linear as torch has it, checked; ``fisher``: see :mod:`ziplm_deploy.pruning.fisher`.

        Raises:
            NumericalError: weights or moments are not finite.
        """
        r, d = weight.shape
        if d % group_size or moments.mean.numel() != d:
            raise ValueError(f"expected {d} columns in groups of {group_size}, found moments of {moments.mean.numel()}")
        W = weight.detach().double()
        b = bias.detach().double() if bias is not None else torch.zeros(r, dtype=torch.float64)
        if not all(bool(torch.isfinite(x).all()) for x in (W, b, moments.hessian, moments.mean)):
            raise NumericalError("expected finite weights and statistics, found NaN or infinity; check the model")
        return cls(W, b, moments, group_size, None if fisher is None else _factor(fisher))

    def weighted(self, outputs: Tensor) -> Tensor:
        """``Lᵀ`` times what has an output's rows, [r] or [r, k]."""
        return outputs if self.factor is None else self.factor.T @ outputs

    def unweighted(self, outputs: Tensor) -> Tensor:
        """The inverse of :meth:`weighted`, [r, k]."""
        if self.factor is None:
            return outputs
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, outputs, upper=True)
        return solved

    @property
    def n_structures(self) -> int:
        return self.weight.shape[1] // self.group_size

    def columns(self, structures: Tensor) -> Tensor:
        """Column indices [k * group] of structures [k]."""
        return (structures[:, None] * self.group_size + torch.arange(self.group_size)).flatten()

    @property
    def output_power(self) -> float:
        """``E‖Lᵀ(W x + b)‖²``."""
        W, b, moments = self.weighted(self.weight), self.weighted(self.bias), self.moments
        cross = 2 * torch.dot(b, W @ moments.mean) + b.square().sum()
        return float(((W @ moments.hessian) * W).sum() + cross)


FISHER_FLOOR = 1e-3  # of its mean diagonal: a direction without gradients is worth something, too


def _factor(fisher: Tensor) -> Tensor:
    """L, [r, r] lower, of the floored Fisher information; the identity's where there are no gradients at all."""
    r = len(fisher)
    mean = float(fisher.diagonal().mean())
    if mean <= 0:
        return torch.eye(r, dtype=torch.float64)
    factor: Tensor = torch.linalg.cholesky(fisher + FISHER_FLOOR * mean * torch.eye(r, dtype=torch.float64))
    return factor


class Method(ABC):
    """One pruning method, a page in this folder; ``METHOD`` of the page is its only instance.

    The full size always holds the weights as they are, and size 0 the mean output, or nothing: see
    :meth:`moves_mean_to_bias`.
    """

    title: ClassVar[str]  # a few words for the report
    refits: ClassVar[bool] = False  # whether kept weights are refitted to the dense residual stream after the plan
    searches: ClassVar[bool] = False  # whether plans come from the search, and not from :meth:`plan`
    measures: ClassVar[bool] = False  # whether plans come from :meth:`measured_plan`
    in_order: ClassVar[bool] = False  # whether modules are always decided in order, as `prune.in_order` asks of any

    def scores(self, linear: OutputLinear, seed: int) -> Tensor | None:
        """Importance of every structure, float64 [n], kept in the database for plans; None: plans need none."""
        return None

    @abstractmethod
    def levels(self, linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, seed: int) -> tuple[Levels, float]:
        """Levels of these sizes, each in 1..n-1 and descending, and the relative damping that was used (0: none)."""

    def moves_mean_to_bias(self, prune: PruneConfig) -> bool:
        """Whether the bias takes over the mean output of what is removed."""
        return False

    def level_sizes(self, sizes: Sequence[int], n: int) -> list[int]:
        """Sizes, of ``sizes``, that this method has levels of, descending."""
        return sorted(set(sizes), reverse=True)

    def plan(self, space: SearchSpace, budget_ms: float, scores: Mapping[str, Tensor], seed: int) -> Plan:
        """A plan with ``Σ latency <= budget_ms``; raises ``spdy.InfeasibleBudgetError`` where none fits."""
        raise NotImplementedError(f"{type(self).__name__} plans by the search, or by measured losses")

    def measured_plan(self, space: SearchSpace, budget_ms: float, loss: Loss) -> Plan:
        """A plan within the budget, as :meth:`plan` makes one, from the losses of the plans that it asks for."""
        raise NotImplementedError(f"{type(self).__name__} plans without measured losses")


def relative_error(error: float, power: float) -> float:
    """Error over power, at least 0; a module that outputs nothing loses nothing."""
    return max(error, 0.0) / power if power > 0 else 0.0
