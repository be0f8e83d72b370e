"""Scores as labels (similarity, ratings): reading them, and the correlation of predictions with them."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import pearsonr, spearmanr

from ziplm_deploy.errors import DataError


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


def correlations(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Spearman's and Pearson's correlation of two arrays ``[n]``; 0 for a collapsed model, where none is defined.

    Raises:
        DataError: the labels allow no correlation: fewer than 3 rows, or all the same.
    """
    if len(labels) < 3 or np.ptp(labels) == 0:
        raise DataError(
            f"expected at least 3 evaluation rows with differing scores, found {len(labels)} row(s) with "
            f"{len(set(labels.tolist()))} score(s); give more data"
        )
    if not np.isfinite(predicted).all() or np.ptp(predicted) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    return {"spearman": float(spearmanr(predicted, labels)[0]), "pearson": float(pearsonr(predicted, labels)[0])}
