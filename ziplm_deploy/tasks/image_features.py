"""Image embeddings, judged by whether the images that are nearest to one are of its class."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from exporters.heads import image_embedding, sentence_dense
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks.base import Which, unwrapped
from ziplm_deploy.tasks.batching import Batch, as_float32
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.embeddings import EmbeddingTask, similarity_matrix
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.images import ImageTask, image_batches
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.ranking import NDCG, RECALL_1, RETRIEVAL_METRICS, ndcg, ranked_gains, right_and_wrong_query

QUERIES_AT_ONCE = 256  # rows of the matrix of similarities in memory


class ImageFeatureExtraction(EmbeddingTask, ImageTask):
    """One vector an image. Labels, which only the evaluation reads, are classes of any name, none of the model's.

    Each image is a query among all others, of which those of its class are relevant: nDCG@10, and Recall@1 as metric
    learning has it, the share of images whose nearest other one is of their class.
    """

    name = "image-feature-extraction"
    metric_name = NDCG
    metrics = RETRIEVAL_METRICS
    ort_class = "ORTModelForCustomTasks"
    output_names = ("image_embeds",)
    feature_outputs = ("image_embeds",)

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        rows = super().normalize_rows(raw, data, which)
        if which == "evaluation" and not any(_relevant([row["label"] for row in rows])):
            raise DataError(
                f"expected two images of one class to find each other, found {len(rows)} images of as many classes; "
                "give several of each, or no data.evaluation"
            )
        return rows

    def embed(self, function: ModelFunction, data: EvaluationSet) -> np.ndarray:
        """Embeddings ``[rows, size]`` of the rows' ``image``."""
        embeddings: dict[int, np.ndarray] = {}
        for indices, inputs in image_batches(data):
            found = as_float32(function(inputs)["image_embeds"])
            embeddings.update(zip(indices, found, strict=False))  # rows past the indices fill up a fixed batch
        return np.stack([embeddings[index] for index in range(len(data.rows))])

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs, inner = super().forward(model, batch), unwrapped(model)
        outputs["image_embeds"] = image_embedding(outputs, inner.config, *self.model.head, sentence_dense(inner))
        return outputs

    def label_note(self, rows: list[Row], config: Any) -> str | None:
        alone = len(rows) - len(_queries(rows))
        if not alone:
            return None
        return (
            f"{alone:,} of {len(rows):,} evaluation images are the only ones of their class: others are searched among "
            "them, too, but nothing is to be found for them, and scores leave them out"
        )

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        """``ndcg_at_10`` and ``recall_at_1`` of every image that is not alone in its class."""
        embeddings = self.embed(function, data)
        labels = [row["label"] for row in data.rows]
        queries = _queries(data.rows)
        found: dict[str, list[float]] = {NDCG: [], RECALL_1: []}
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[first : first + QUERIES_AT_ONCE]
            nearness = similarity_matrix(embeddings[part], embeddings, self.similarity)  # [part, images]
            for query, scores in zip(part, nearness, strict=True):
                others = np.arange(len(labels)) != query
                gains = np.array([label == labels[query] for label in labels], dtype=np.float64)[others]
                found[NDCG].append(ndcg(scores[others], gains))
                found[RECALL_1].append(float(ranked_gains(scores[others], gains)[0]))
        return Outcomes({name: np.array(values) for name, values in found.items()})

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return right_and_wrong_query(outcomes)


def _relevant(labels: list[Any]) -> npt.NDArray[np.bool_]:
    """Whether each label has another one like it."""
    counts = Counter(labels)
    return np.array([counts[label] > 1 for label in labels], dtype=bool)


def _queries(rows: list[Row]) -> list[int]:
    """Positions of images that have another one of their class to find."""
    return np.flatnonzero(_relevant([row["label"] for row in rows])).tolist()
