"""Sequence classification of single texts and of pairs, judged by accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from ziplm_deploy.config import DataConfig
from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.base import Batch, Run, Task, Which, class_logits, map_label
from ziplm_deploy.tasks.batching import encode_examples, run_batches, tokenize
from ziplm_deploy.tasks.data import Row, cell


class TextClassification(Task):
    """Rows: ``{"text", "text_pair" (pairs), "label" (if the data have one)}``."""

    name = "text-classification"
    metric_name = "accuracy"
    auto_class = "AutoModelForSequenceClassification"
    ort_class = "ORTModelForSequenceClassification"
    output_names = ("logits",)
    text_columns = (
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text1", "text2"),
        ("sentence",),
        ("text",),
    )
    label_columns = ("label", "labels")

    def normalise_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        columns = self.columns(raw, data)
        if len(columns) > 2:
            raise DataError(f"expected one or two text columns, found data.text_columns {columns}; name at most two")
        label = self.find_label_column(raw, data, which)
        rows: list[Row] = []
        for number, source in enumerate(raw, 1):
            texts = [cell(source, name, str, number, "text") for name in columns]
            row: Row = dict(zip(("text", "text_pair"), texts, strict=False))
            if label is not None:
                row["label"] = cell(source, label, (int, float, str), number, "a label")
            rows.append(row)
        return rows

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        return check_class_labels(rows, config)

    def encode(
        self,
        rows: list[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        *,
        pad_to: int | None = None,
        sort: bool = True,
    ) -> list[Batch]:
        examples = tokenize(processor, rows, max_length)
        return encode_examples(examples, processor, batch_size, pad_to=pad_to, sort=sort)

    def evaluate(
        self,
        run: Run,
        rows: list[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        pad_to: int | None = None,
    ) -> dict[str, float]:
        labels = class_numbers(rows)
        examples = tokenize(processor, rows, max_length)
        logits = class_logits(run, run_batches(examples, processor, batch_size, pad_to), len(rows))
        return classification_metrics(logits, labels)

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        return outputs["logits"]


def check_class_labels(rows: list[Row], config: Any) -> list[Row]:
    """Rows with one class number each, by the model's head; raises :class:`DataError` as :func:`map_label` does."""
    if config.num_labels < 2:
        raise DataError(
            f"expected a classifier with two or more labels, found a head with {config.num_labels} (regression); it "
            "cannot be pruned by comparing class probabilities"
        )
    return [
        {**row, "label": map_label(row["label"], config, number)} if "label" in row else row
        for number, row in enumerate(rows, 1)
    ]


def class_numbers(rows: list[Row]) -> list[int]:
    """Labels of the rows; raises :class:`DataError` where they were not checked against the head."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("label"), int):
            raise DataError(
                f"expected a class number as label in row {number}, found {row.get('label')!r}; pass the rows that "
                "check_labels returned"
            )
    return [row["label"] for row in rows]


def classification_metrics(logits: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Accuracy and macro F1 of logits ``[n, classes]``."""
    predicted = logits.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
