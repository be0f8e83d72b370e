"""Scores as labels (similarity, ratings): reading them, and what a model predicts for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.metrics import Metric, pearson, spearman
from ziplm_deploy.tasks.outcomes import Outcomes

CORRELATIONS: Mapping[str, Metric] = {"spearman": spearman, "pearson": pearson}


def parse_score(value: float | str, number: int, what: str) -> float:
    """A finite number; ``number`` is the row's, from 1.

    Raises:
        DataError: it is no number, NaN or infinite; names the row.
    """
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"expected a number as {what}, found {value!r} in row {number}; correct that row")
    return score


def value_outcomes(predicted: np.ndarray, labels: np.ndarray) -> Outcomes:
    """``label`` and ``predicted``, numbers [n]; answers that are not all finite count as collapsed.

    Raises:
        DataError: the labels allow no correlation: fewer than 3 rows, or all the same.
    """
    if len(labels) < 3 or np.ptp(labels) == 0:
        raise DataError(
            f"expected at least 3 evaluation rows with differing scores, found {len(labels)} row(s) with "
            f"{len(set(labels.tolist()))} score(s); give more data"
        )
    predicted = np.asarray(predicted, dtype=np.float64)
    if not np.isfinite(predicted).all():
        predicted = np.zeros_like(predicted)  # of a constant no correlation is defined; the metrics give 0
    return Outcomes({"label": labels, "predicted": predicted})
