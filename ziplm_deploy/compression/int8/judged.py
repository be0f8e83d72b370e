"""What searches for an INT8 file within an accuracy budget have in common: scores that are checked, and the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ziplm_deploy.errors import NumericalError


@dataclass(frozen=True)
class Judged:
    """Score of the file that a search chose, and how it came about.

    ``tried``: (number of linears that are no longer INT8 for its sake, score) in the order of the search.
    """

    score: float
    reference_score: float  # of the model before INT8
    tried: tuple[tuple[int, float], ...]
    within_budget: bool


def holds_budget(score: float, reference_score: float, max_loss: float) -> bool:
    """Whether a score, higher is better, loses at most ``max_loss`` of that before INT8."""
    return reference_score - score <= max_loss * abs(reference_score)


def check_score(what: str, score: float) -> None:
    """Raise :class:`NumericalError` for a score that is not finite."""
    if not math.isfinite(score):
        raise NumericalError(f"expected a finite score {what}, found {score}; check the calibration data")
