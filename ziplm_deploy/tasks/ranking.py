"""Ranked lists: what one query's order of candidates is worth, for rerankers and for embeddings that search.

Gains are linear, as in trec_eval and MTEB. Candidates with the same score count as ranked the worst way round, so that
a collapsed model, which scores all alike, gains nothing from the order of a file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ziplm_deploy.tasks.metrics import Metric, ratio_of_sums
from ziplm_deploy.tasks.outcomes import Outcomes

TOP = 10  # ranks that count
Numbers = npt.NDArray[np.float64]

ASYMMETRIC = "asymmetric_"  # before the name of a metric: queries by a member, passages by the dense model
NDCG, MRR, RECALL_1 = f"ndcg_at_{TOP}", f"mrr_at_{TOP}", "recall_at_1"
# Means over the queries: of rerankers, and of embeddings that search.
RANKING_METRICS: Mapping[str, Metric] = {name: ratio_of_sums(name) for name in (NDCG, MRR)}
RETRIEVAL_METRICS: Mapping[str, Metric] = {name: ratio_of_sums(name) for name in (NDCG, RECALL_1)}


def ranked_gains(scores: Numbers, gains: Numbers) -> Numbers:
    """Relevance of the first :data:`TOP` candidates in the order that ``scores`` [candidates] put them in.

    ``gains``: relevance [candidates], at least 0. Scores that are not all finite count as equal.
    """
    if not np.isfinite(scores).all():
        scores = np.zeros_like(scores)
    order = np.lexsort((gains, -scores))  # by falling score, then by rising relevance
    return np.asarray(gains[order[:TOP]], dtype=np.float64)


def ndcg(scores: Numbers, gains: Numbers) -> float:
    """Discounted gain of the first :data:`TOP` ranks over the best possible one (Järvelin and Kekäläinen, 2002).

    0 where no candidate is relevant.
    """
    found, best = ranked_gains(scores, gains), np.sort(gains)[::-1][:TOP]
    ideal = _discounted(best)
    return _discounted(found) / ideal if ideal else 0.0


def _discounted(gains: Numbers) -> float:
    return float(np.sum(gains / np.log2(np.arange(len(gains)) + 2)))


def reciprocal_rank(scores: Numbers, gains: Numbers) -> float:
    """1 / rank of the first relevant candidate; 0 where none is among the first :data:`TOP`."""
    (relevant,) = np.nonzero(ranked_gains(scores, gains) > 0)
    return 1.0 / (int(relevant[0]) + 1) if len(relevant) else 0.0


def right_and_wrong_query(outcomes: Outcomes) -> Outcomes:
    """A query with the best and one with the worst value of everything; see ``Task.right_and_wrong``."""
    return Outcomes({name: np.array([1.0, 0.0]) for name in outcomes.arrays})
