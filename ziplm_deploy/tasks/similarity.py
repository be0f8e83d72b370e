"""Sentence embeddings, judged by the rank correlation of their similarities with human similarity scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from exporters.heads import pool, sentence_dense
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig, Similarity
from ziplm_deploy.tasks.base import Task, Which, unwrapped
from ziplm_deploy.tasks.batching import (
    Arrays,
    Batch,
    as_float32,
    token_lengths,
    tokenize,
    training_examples,
)
from ziplm_deploy.tasks.data import Row, cell
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.losses import sampled_direction
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.scores import CORRELATIONS, parse_score, value_outcomes

NEIGHBOURS = 10


class SentenceSimilarity(Task):
    """Rows: distinct ``{"text"}``; for evaluation ``{"text", "text_pair", "label": float}``; all with the prompt."""

    name = "sentence-similarity"
    metric_name = "spearman"
    metrics = CORRELATIONS
    auto_class = "AutoModel"
    takes_causal = True
    ort_class = "ORTModelForFeatureExtraction"
    output_names = ("last_hidden_state", "sentence_embedding")
    text_columns = (("sentence1", "sentence2"), ("text1", "text2"))
    label_columns = ("label", "score", "similarity")
    label_names = ()  # embeddings are trained against the dense model's
    feature_outputs = ("sentence_embedding",)

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.with_defaults())

    @property
    def _similarity(self) -> Similarity:
        return self.model.similarity or "cosine"

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        prompt = self.model.prompt or ""
        if which != "evaluation":
            columns = self.columns(raw, data, (*self.text_columns, ("sentence",), ("text",)))
            texts = (cell(row, name, str, n, "text") for n, row in enumerate(raw, 1) for name in columns)
            return [{"text": prompt + text} for text in dict.fromkeys(texts) if text.strip()]
        columns = self.columns(raw, data)
        if len(columns) != 2:
            raise DataError(
                f"expected two text columns for pairs of sentences, found data.text_columns {columns}; name both"
            )
        label = self.find_label_column(raw, data, which)
        assert label is not None  # evaluation data without one was refused
        return [
            {
                "text": prompt + cell(row, columns[0], str, number, "text"),
                "text_pair": prompt + cell(row, columns[1], str, number, "text"),
                "label": self._score(row, label, number),
            }
            for number, row in enumerate(raw, 1)
        ]

    @staticmethod
    def _score(row: Row, column: str, number: int) -> float:
        value = cell(row, column, (int, float, str), number, "a similarity score")
        return parse_score(value, number, "similarity score")

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        raise DataError(
            "expected a task with a head to fine-tune, found sentence-similarity: fine-tuning embeddings from labels "
            "is not supported; set dense.train to false and give a model that is trained already"
        )

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        return token_lengths(processor, flatten(rows))

    def inputs(self, rows: list[Row]) -> list[Any]:
        return [row["text"] for row in flatten(rows)]

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        distinct = data.with_rows(flatten(data.rows))
        return distinct.tensors(distinct.tokenize(), sort=sort)

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """Texts without labels; those of pairs once each, so not one example a row."""
        return training_examples(tokenize(processor, flatten(rows), max_length))

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        distinct = flatten(data.rows)
        embeddings = self.embed(function, data.with_rows(distinct))
        position = {row["text"]: index for index, row in enumerate(distinct)}
        left = embeddings[[position[row["text"]] for row in data.rows]]
        right = embeddings[[position[row["text_pair"]] for row in data.rows]]
        similarity = similarities(left, right, self._similarity)
        labels = np.array([row["label"] for row in data.rows], dtype=np.float64)
        return value_outcomes(similarity, labels)

    def fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> dict[str, float]:
        """Mean cosine to the dense embeddings and overlap of ten nearest neighbours; empty for ten texts or fewer.

        Neighbours are nearest by the similarity that the model was made for.
        """
        distinct = flatten(data.rows)
        if len(distinct) <= NEIGHBOURS:
            return {}
        own = self.embed(function, data.with_rows(distinct))
        return embedding_fidelity(own, self.embed(dense, dense_data.with_rows(distinct)), self._similarity)

    def embed(self, function: ModelFunction, data: EvaluationSet) -> np.ndarray:
        """Embeddings ``[rows, hidden]`` of the rows' ``text``, from ``sentence_embedding`` or by pooling here."""
        texts = data.with_rows([{"text": row["text"]} for row in data.rows])
        embeddings: dict[int, np.ndarray] = {}
        for indices, inputs in texts.batches(texts.tokenize()):
            outputs = function(inputs)
            pooled = outputs.get("sentence_embedding")
            pooled = self._pool_arrays(outputs["last_hidden_state"], inputs) if pooled is None else as_float32(pooled)
            embeddings.update(zip(indices, pooled, strict=False))  # rows past the indices fill up a fixed batch
        return np.stack([embeddings[index] for index in range(len(data.rows))])

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = super().forward(model, batch)
        hidden, dense = outputs["last_hidden_state"], sentence_dense(unwrapped(model))
        outputs["sentence_embedding"] = self._pool(hidden, batch["attention_mask"], dense)
        return outputs

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        return outputs["sentence_embedding"]

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """Mean of 1 - cosine between embeddings ``[n, size]``.

        Where similarity is not their cosine: half the relative squared distance, the same for those of length 1.
        """
        if self._similarity != "cosine":
            squared = (candidate.float() - dense.float()).square().sum(-1)
            return (squared / (2 * dense.float().square().sum(-1)).clamp(min=1e-12)).mean()
        return 1.0 - cosine_similarity(candidate.float(), dense.float(), dim=-1).mean()

    def sampled_loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        length = features.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)
        scaled = features.float() / (length if self._similarity == "cosine" else length.detach())
        return sampled_direction(scaled, generator)

    def distillation_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The divergence; a temperature has no meaning here."""
        return self.divergence(student, teacher.detach())

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        raise DataError(
            "expected a task with a loss of its own, found sentence-similarity, which learns from the teacher only; "
            "set recover.task_weight to 0"
        )

    def _pool(self, hidden: Tensor, mask: Tensor, dense: nn.Module | None = None) -> Tensor:
        """Embeddings [batch, size] of hidden states [batch, length, hidden], as the exported graph makes them."""
        return pool(hidden, mask, *self.model.head, dense)

    def _pool_arrays(self, hidden: np.ndarray, inputs: Arrays) -> np.ndarray:
        pooled = self._pool(torch.from_numpy(as_float32(hidden)), torch.from_numpy(inputs["attention_mask"]))
        return pooled.numpy()


def flatten(rows: list[Row]) -> list[Row]:
    """The distinct texts of rows and pairs, in order of appearance, as rows ``{"text"}``."""
    texts = (text for row in rows for text in (row["text"], row.get("text_pair")) if text is not None)
    return [{"text": text} for text in dict.fromkeys(texts)]


def similarities(left: np.ndarray, right: np.ndarray, kind: Similarity) -> np.ndarray:
    """Similarity ``[n]`` of the rows of two arrays ``[n, size]``; distances count as negative, as they usually do."""
    left, right = (np.asarray(each, dtype=np.float64) for each in (left, right))
    if kind == "euclidean":
        return -np.asarray(np.linalg.norm(left - right, axis=1))
    if kind == "manhattan":
        return -np.asarray(np.abs(left - right).sum(axis=1))
    if kind == "cosine":
        left, right = _unit(left), _unit(right)
    return np.asarray(np.sum(left * right, axis=1))


def embedding_fidelity(
    candidate: np.ndarray, dense: np.ndarray, similarity: Similarity = "cosine", neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """Closeness of embeddings ``[n, size]`` to the dense model's on the same texts.

    Returns ``mean_cosine`` and ``neighbour_overlap``: the mean share of each text's nearest ``neighbours`` (by
    ``similarity``, itself left out) that both models agree on.
    """
    if candidate.shape[0] != dense.shape[0] or candidate.shape[0] <= neighbours:
        raise DataError(
            f"expected embeddings of the same texts, more than {neighbours}, found {candidate.shape[0]} and "
            f"{dense.shape[0]}; give more texts"
        )
    near_a, near_b = (_nearest(vectors, similarity, neighbours) for vectors in (candidate, dense))
    shared = [len(set(one) & set(other)) for one, other in zip(near_a.tolist(), near_b.tolist(), strict=True)]
    return {
        "mean_cosine": float(similarities(candidate, dense, "cosine").mean()),
        "neighbour_overlap": float(np.mean(shared)) / neighbours,
    }


def similarity_matrix(left: np.ndarray, right: np.ndarray, kind: Similarity) -> np.ndarray:
    """Similarity ``[n, m]`` of every row of ``[n, size]`` to every row of ``[m, size]``; see :func:`similarities`."""
    left, right = (np.asarray(each, dtype=np.float64) for each in (left, right))
    if kind in ("euclidean", "manhattan"):
        return -np.asarray(cdist(left, right, "cityblock" if kind == "manhattan" else "euclidean"))
    if kind == "cosine":
        left, right = _unit(left), _unit(right)
    return np.asarray(left @ right.T)


def _nearest(vectors: np.ndarray, similarity: Similarity, neighbours: int) -> np.ndarray:
    """Positions ``[n, neighbours]`` of the other vectors that are most similar to each, in no order."""
    nearness = similarity_matrix(vectors, vectors, similarity)  # [n, n]
    np.fill_diagonal(nearness, -np.inf)
    return np.argpartition(-nearness, neighbours - 1, axis=1)[:, :neighbours]


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
