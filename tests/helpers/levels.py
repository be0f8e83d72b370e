"""Levels of a plain matrix by a pruning method of any name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.pruning.database import build_levels
from ziplm_deploy.pruning.methods import OutputLinear
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.recipe import PruneConfig


def levels_of(
    linear: tuple[Tensor, Tensor | None, InputMoments],
    sizes: Sequence[int],
    *,
    group_size: int = 1,
    seed: int = 0,
    **settings: Any,
) -> dict[int, LevelWeights]:
    """Levels of a weight [r, d] with bias [r] and moments; ``settings`` are those of the recipe's section ``prune``."""
    weight, bias, moments = linear
    output = OutputLinear.of(weight, bias, moments, group_size)
    levels, _ = build_levels(output, sizes, PruneConfig(**settings), seed=seed)
    return levels
