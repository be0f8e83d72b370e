"""Cross-encoders: a query and a passage go in together, one score comes out; judged by the order of the passages.

Encoders get pairs as their tokenizer puts them together, causal rerankers in a prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig, TaskName
from ziplm_deploy.tasks.base import Which
from ziplm_deploy.tasks.batching import Batch, Example
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.data import Row, sample_rows
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.labels import labels_of, require_labels
from ziplm_deploy.tasks.metrics import score, spearman
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.pairs import pair_lengths, pair_prompt_of, tokenize_pairs
from ziplm_deploy.tasks.ranking import MRR, NDCG, RANKING_METRICS, ndcg, reciprocal_rank, right_and_wrong_query
from ziplm_deploy.tasks.regression import TextRegression

PAIRS = (
    *(("query", name) for name in ("passage", "document", "text", "answer", "response")),
    *(("question", name) for name in ("passage", "document", "context", "answer")),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
)


class Reranking(TextRegression):
    """Rows: ``{"text": query, "text_pair": passage, "label": relevance}``; rows of the same query belong together.

    Outcomes have one value a query. Relevance is 0 or more; the loss on labels takes 0 to 1. Models score by their last
    token where they are causal: then the score is the logit of yes, less that of no.
    """

    name: ClassVar[TaskName] = "reranking"
    metric_name = NDCG
    metrics = RANKING_METRICS
    text_columns = PAIRS
    label_columns = ("label", "labels", "score", "relevance")
    takes_causal = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._prompt = pair_prompt_of(model)

    def tokenized(self, rows: list[Row], processor: Any, max_length: int) -> list[Example]:
        return tokenize_pairs(processor, self._prompt, rows, max_length)

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        return pair_lengths(processor, self._prompt, rows)

    def check_room(self, processor: Any, max_length: int) -> None:
        """Raise :class:`RecipeError` for a prompt that leaves no token to a document."""
        if self._prompt is not None:
            self.tokenized([{"text": "", "text_pair": ""}], processor, max_length)

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        self._check_pairs(raw, data)
        rows = super().normalize_rows(raw, data, which)
        if which != "evaluation":
            return rows
        for number, row in enumerate(rows, 1):
            if row["label"] < 0:
                raise DataError(
                    f"expected relevance of 0 or more, found {row['label']:g} in row {number}; a passage that does not "
                    "answer has 0"
                )
        if not decided(rows):
            raise DataError(
                f"expected a query with a relevant passage (label above 0) and a less relevant one, found none among "
                f"{len(by_query(rows))} queries; give several passages a query, one row each"
            )
        return rows

    def _check_pairs(self, raw: list[Row], data: DataConfig) -> None:
        columns = data.text_columns
        if columns is None and any(set(pair) <= set(raw[0]) for pair in self.text_columns):
            return
        if columns is None or len(columns) == 1:
            found = ", ".join(map(repr, raw[0] if columns is None else columns))
            raise DataError(
                f"expected pairs of query and passage for {self.name}, whose models score a pair, found {found}; name "
                "both in data.text_columns, the query first (texts without a query have no score)"
            )

    def read_label(self, value: int | float | str, number: int) -> float:
        if isinstance(value, NamedClass) and value.name is not None:
            raise DataError(
                f"expected a number as relevance, found the class {value.name!r} in row {number}, whose number may "
                "mean anything; give a column with 1 for relevant passages and 0 for others"
            )
        return super().read_label(value, number)

    def sample(self, rows: list[Row], which: Which, count: int | None, seed: int) -> list[Row]:
        """Rows of a sample; of evaluation rows ``count`` queries, each with all its passages."""
        if which != "evaluation":
            return super().sample(rows, which, count, seed)
        queries = [{"rows": [rows[index] for index in indices]} for indices in by_query(rows)]
        drawn = sample_rows(queries, count, seed, field="n_evaluation", shuffle=False)
        return [row for query in drawn for row in query["rows"]]

    def label_note(self, rows: list[Row], config: Any) -> str | None:
        queries, counted = len(by_query(rows)), len(decided(rows))
        if counted == queries:
            return None
        return (
            f"{queries - counted:,} of {queries:,} evaluation queries have passages that are all relevant, or none "
            "that is: no order of theirs is better than another, and scores leave them out"
        )

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        _check_targets(require_labels(rows))
        return {"num_labels": 1, "problem_type": None}

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        _check_targets(labels_of(rows) or [])
        return super().examples(rows, processor, max_length)

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        """``ndcg_at_10`` and ``mrr_at_10`` of every query whose passages differ in relevance."""
        scores = self.predict(function, data)[:, 0].astype(np.float64)
        gains = np.array([row["label"] for row in data.rows], dtype=np.float64)
        queries = [(scores[indices], gains[indices]) for indices in decided(data.rows)]
        return Outcomes(
            {
                NDCG: np.array([ndcg(*query) for query in queries]),
                MRR: np.array([reciprocal_rank(*query) for query in queries]),
            }
        )

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return right_and_wrong_query(outcomes)

    def fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> dict[str, float]:
        """``score_correlation``: Spearman's, of the scores of all pairs with the dense model's; 0 of a constant."""
        own, reference = self.predict(function, data)[:, 0], self.predict(dense, dense_data)[:, 0]
        if not np.isfinite(own).all():
            own = np.zeros_like(own)
        pairs = Outcomes({"label": reference.astype(np.float64), "predicted": own.astype(np.float64)})
        return {"score_correlation": score(spearman, pairs)}

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean binary cross-entropy of the score as a logit, with labels 0 to 1, as CrossEncoder trains one output."""
        (labels,) = self.labels(batch)
        return binary_cross_entropy_with_logits(outputs["logits"].float().squeeze(-1), labels)  # [batch, 1] → [batch]


def by_query(rows: list[Row]) -> list[list[int]]:
    """Indices of every query's rows, queries in the order in which they first appear."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["text"], []).append(index)
    return list(groups.values())


def decided(rows: list[Row]) -> list[list[int]]:
    """Queries of :func:`by_query` with passages of more than one relevance, whose order can be right or wrong."""
    return [indices for indices in by_query(rows) if len({rows[index]["label"] for index in indices}) > 1]


def _check_targets(labels: list[float]) -> None:
    """Raise :class:`DataError` for labels that are no probabilities."""
    for number, label in enumerate(labels, 1):
        if not 0 <= label <= 1:
            raise DataError(
                f"expected labels from 0 to 1 to train a reranker on, found {label:g} in row {number}; scale them, or "
                "set recover.task_weight to 0: distillation reads none"
            )
