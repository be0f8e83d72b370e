"""Sentence embeddings, judged by the rank correlation of their similarities with human similarity scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.heads import pool, sentence_dense, text_embedding
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks.base import Which, unwrapped
from ziplm_deploy.tasks.batching import (
    Arrays,
    Batch,
    Example,
    as_float32,
    filled_up,
    token_lengths,
    training_examples,
)
from ziplm_deploy.tasks.data import Row, cell
from ziplm_deploy.tasks.embeddings import EmbeddingTask, similarities
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.scores import CORRELATIONS, parse_score, value_outcomes


class SentenceSimilarity(EmbeddingTask):
    """Rows: distinct ``{"text"}``; for evaluation ``{"text", "text_pair", "label": float}``; all with the prompt."""

    name = "sentence-similarity"
    metric_name = "spearman"
    metrics = CORRELATIONS
    takes_causal = True
    ort_class = "ORTModelForFeatureExtraction"
    output_names = ("last_hidden_state", "sentence_embedding")
    text_columns = (("sentence1", "sentence2"), ("text1", "text2"))
    label_columns = ("label", "score", "similarity")
    feature_outputs = ("sentence_embedding",)

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        if self.model.pooling == "pooler":  # which sentence-transformers has not, so that the graph alone gives it
            self.ort_class = "ORTModelForCustomTasks"

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

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        return token_lengths(processor, flatten(rows))

    def inputs(self, rows: list[Row]) -> list[Any]:
        return [row["text"] for row in flatten(rows)]

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        distinct = data.with_rows(flatten(data.rows))
        return distinct.tensors(self._tokenized(distinct), sort=sort)

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """Texts without labels; those of pairs once each, so not one example a row."""
        return training_examples(self._tokenized(EvaluationSet(flatten(rows), processor, max_length)))

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        distinct = flatten(data.rows)
        embeddings = self.embed(function, data.with_rows(distinct))
        position = {row["text"]: index for index, row in enumerate(distinct)}
        left = embeddings[[position[row["text"]] for row in data.rows]]
        right = embeddings[[position[row["text_pair"]] for row in data.rows]]
        similarity = similarities(left, right, self.similarity)
        labels = np.array([row["label"] for row in data.rows], dtype=np.float64)
        return value_outcomes(similarity, labels)

    def distinct(self, rows: list[Row]) -> list[Row]:
        return flatten(rows)

    def embed(self, function: ModelFunction, data: EvaluationSet) -> np.ndarray:
        """Embeddings ``[rows, hidden]`` of the rows' ``text``, from ``sentence_embedding`` or by pooling here."""
        texts = data.with_rows([{"text": row["text"]} for row in data.rows])
        embeddings: dict[int, np.ndarray] = {}
        for indices, inputs in texts.batches(self._tokenized(texts)):
            outputs = function(inputs)
            pooled = outputs.get("sentence_embedding")
            pooled = self._pool_arrays(outputs["last_hidden_state"], inputs) if pooled is None else as_float32(pooled)
            embeddings.update(zip(indices, pooled, strict=False))  # rows past the indices fill up a fixed batch
        return np.stack([embeddings[index] for index in range(len(data.rows))])

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = super().forward(model, batch)
        dense, mask = sentence_dense(unwrapped(model)), batch.get("attention_mask")
        outputs["sentence_embedding"] = text_embedding(outputs, mask, *self.model.head, dense)
        return outputs

    def _tokenized(self, data: EvaluationSet) -> list[Example]:
        """Inputs of rows with ``text``; for a model with a head of its own all of the one length that it reads."""
        examples = data.tokenize()
        if self.model.pooling != "pooler":
            return examples
        return [filled_up(example, data.max_length, data.processor) for example in examples]

    def _pool_arrays(self, hidden: np.ndarray, inputs: Arrays) -> np.ndarray:
        mask = torch.from_numpy(inputs["attention_mask"])
        return pool(torch.from_numpy(as_float32(hidden)), mask, *self.model.head).numpy()


def flatten(rows: list[Row]) -> list[Row]:
    """The distinct texts of rows and pairs, in order of appearance, as rows ``{"text"}``."""
    texts = (text for row in rows for text in (row["text"], row.get("text_pair")) if text is not None)
    return [{"text": text} for text in dict.fromkeys(texts)]
