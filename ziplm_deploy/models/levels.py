"""Levels: the sizes a module may take, and the weights it has at one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelWeights:
    """The output linear of one module at one level.

    ``kept``: int64 ``[k]``, ascending indices of the kept structures (heads or FFN columns) among those of the model
    that is pruned, which may be resized already; ``weight``: float32 ``[hidden, k * group_size]``, columns in the order
    of ``kept``; ``bias``: float32 ``[hidden]``; ``relative_error``: output error over output power on the calibration
    tokens, 1.0 for a module that is dropped together with its bias.
    """

    kept: Tensor
    weight: Tensor
    bias: Tensor
    relative_error: float

    def __post_init__(self) -> None:
        if self.kept.ndim != 1 or self.kept.dtype != torch.int64:
            raise ValueError(f"expected kept as int64 [k], found {self.kept.dtype} {tuple(self.kept.shape)}")
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"expected weight [hidden, columns] and bias [hidden], "
                f"found {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )
        columns = self.weight.shape[1]
        if columns % self.size if self.size else columns:
            raise ValueError(f"expected a multiple of {self.size} columns, found {columns}")

    @property
    def size(self) -> int:
        """Number of kept structures; 0 = module dropped."""
        return int(self.kept.numel())


def ffn_widths(width: int, ratio: float = 0.9, align: int = 1, min_fraction: float = 0.01) -> list[int]:
    """FFN widths ``width * ratio**i`` down to ``min_fraction``, rounded to ``align``; descending, with full and 0.

    Raises:
        ValueError: width or align below 1, ratio or min_fraction outside (0, 1).
    """
    if width < 1 or align < 1 or not 0 < ratio < 1 or not 0 < min_fraction < 1:
        raise ValueError(
            "expected width >= 1, align >= 1, 0 < ratio < 1 and 0 < min_fraction < 1, "
            f"found width={width}, align={align}, ratio={ratio}, min_fraction={min_fraction}"
        )
    widths = {width, 0}
    exact = width * ratio
    while exact >= max(width * min_fraction, 1):
        widths.add(min(width, max(align, round(exact / align) * align)))
        exact *= ratio
    return sorted(widths, reverse=True)


def head_counts(heads: int) -> list[int]:
    """All head counts ``heads, heads - 1, …, 0``; raises ``ValueError`` for fewer than one head."""
    if heads < 1:
        raise ValueError(f"expected at least one head, found {heads}")
    return list(range(heads, -1, -1))


def pareto_levels(sizes: Sequence[int], latencies: Mapping[int, float]) -> list[int]:
    """Sizes, descending, without those that are not strictly faster than a wider one that stays.

    The largest size always stays. ``latencies`` maps size to milliseconds; real tables are not monotone.

    Raises:
        KeyError: a size has no latency.
    """
    kept: list[int] = []
    fastest = float("inf")
    for size in sorted(set(sizes), reverse=True):
        if not kept or latencies[size] < fastest:
            kept.append(size)
            fastest = latencies[size]
    return kept
