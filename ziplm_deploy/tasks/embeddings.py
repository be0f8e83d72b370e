"""Embeddings of any kind of input: how they are compared with each other and with the dense model's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import ModelConfig, Similarity
from ziplm_deploy.tasks.base import Task
from ziplm_deploy.tasks.batching import Batch
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.losses import sampled_direction

NEIGHBOURS = 10


class EmbeddingTask(Task):
    """One vector an input. Members learn the dense model's vectors; no labels are read for that."""

    auto_class = "AutoModel"
    label_names = ()

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.with_defaults())

    @property
    def similarity(self) -> Similarity:
        """How the embeddings of this model are compared."""
        return self.model.similarity or "cosine"

    @abstractmethod
    def embed(self, function: ModelFunction, data: EvaluationSet) -> np.ndarray:
        """Embeddings ``[rows, size]`` in the rows' order."""

    def distinct(self, rows: list[Row]) -> list[Row]:
        """Rows of everything that is embedded for these rows, each once where that is cheap to tell."""
        return rows

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        raise DataError(
            f"expected a task with a head to fine-tune, found {self.name}: fine-tuning embeddings from labels is not "
            "supported; set dense.train to false and give a model that is trained already"
        )

    def fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> dict[str, float]:
        """Mean cosine to the dense embeddings and overlap of ten nearest neighbours; empty for ten inputs or fewer.

        Neighbours are nearest by the similarity that the model was made for.
        """
        distinct = self.distinct(data.rows)
        if len(distinct) <= NEIGHBOURS:
            return {}
        own = self.embed(function, data.with_rows(distinct))
        return embedding_fidelity(own, self.embed(dense, dense_data.with_rows(distinct)), self.similarity)

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        (name,) = self.feature_outputs
        return outputs[name]

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """Mean of 1 - cosine between embeddings ``[n, size]``.

        Where similarity is not their cosine: half the relative squared distance, the same for those of length 1.
        """
        if self.similarity != "cosine":
            squared = (candidate.float() - dense.float()).square().sum(-1)
            return (squared / (2 * dense.float().square().sum(-1)).clamp(min=1e-12)).mean()
        return 1.0 - cosine_similarity(candidate.float(), dense.float(), dim=-1).mean()

    def sampled_loss(self, features: Tensor, generator: Generator) -> Tensor:
        length = features.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)
        scaled = features.float() / (length if self.similarity == "cosine" else length.detach())
        return sampled_direction(scaled, generator)

    def distillation_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The divergence; a temperature has no meaning here."""
        return self.divergence(student, teacher.detach())

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        raise DataError(
            f"expected a task with a loss of its own, found {self.name}, which learns from the teacher only; set "
            "recover.task_weight to 0"
        )


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
    """Closeness of embeddings ``[n, size]`` to the dense model's of the same inputs.

    Returns ``mean_cosine`` and ``neighbour_overlap``: the mean share of each input's nearest ``neighbours`` (by
    ``similarity``, itself left out) that both models agree on.
    """
    if candidate.shape[0] != dense.shape[0] or candidate.shape[0] <= neighbours:
        raise DataError(
            f"expected embeddings of the same inputs, more than {neighbours}, found {candidate.shape[0]} and "
            f"{dense.shape[0]}; give more rows"
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
