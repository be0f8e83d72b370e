"""Heads on single texts and on pairs; here classification, judged by accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks.base import Task, Which, class_logits
from ziplm_deploy.tasks.batching import Batch, Example, tokenize, training_examples
from ziplm_deploy.tasks.data import Row, cell
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.label_metrics import check_label, label_number, label_of
from ziplm_deploy.tasks.label_reading import LabelReading, read_labels
from ziplm_deploy.tasks.labels import (
    check_class_labels,
    class_head,
    class_numbers,
    labels_in,
    labels_of,
    require_labels,
)
from ziplm_deploy.tasks.metrics import (
    Metric,
    accuracy,
    balanced_accuracy,
    class_f1,
    f1_of_class_1,
    macro_f1,
    matthews,
    weighted_f1,
)
from ziplm_deploy.tasks.outcomes import Outcomes

CLASS_METRICS: Mapping[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}
FURTHER_CLASS_METRICS: Mapping[str, Metric] = {
    "balanced_accuracy": balanced_accuracy,
    "f1": f1_of_class_1,
    "matthews": matthews,
    "weighted_f1": weighted_f1,
}


class TextTask(Task):
    """One answer a text or pair. Rows: ``{"text", "text_pair" (pairs), "label" (if the data have one)}``."""

    auto_class = "AutoModelForSequenceClassification"
    ort_class = "ORTModelForSequenceClassification"
    output_names = ("logits",)
    text_columns: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text1", "text2"),
        ("sentence",),
        ("text",),
    )
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels")
    label_kinds: ClassVar[tuple[type, ...]] = (int, float, str)

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        columns = self.columns(raw, data)
        if len(columns) > 2:
            raise DataError(f"expected one or two text columns, found data.text_columns {columns}; name at most two")
        label = self.find_label_column(raw, data, which)
        rows: list[Row] = []
        for number, source in enumerate(raw, 1):
            texts = [cell(source, name, str, number, "text") for name in columns]
            row: Row = dict(zip(("text", "text_pair"), texts, strict=False))
            if label is not None:
                row["label"] = self.read_label(cell(source, label, self.label_kinds, number, "a label"), number)
            rows.append(row)
        return rows

    def read_label(self, value: Any, number: int) -> Any:
        """A label as the rows carry it until :meth:`check_labels`; ``number`` is the row's, from 1."""
        return value

    def tokenized(self, rows: list[Row], processor: Any, max_length: int) -> list[Example]:
        """Truncated, unpadded inputs of rows, in their order."""
        return tokenize(processor, rows, max_length)

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        return data.tensors(self.tokenized(data.rows, data.processor, data.max_length), sort=sort)

    def predict(self, function: ModelFunction, data: EvaluationSet) -> np.ndarray:
        """Logits [rows, outputs] in row order."""
        examples = self.tokenized(data.rows, data.processor, data.max_length)
        return class_logits(function, data.batches(examples), len(data.rows))

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        return outputs["logits"]


class TextClassification(TextTask):
    """Classes of texts or pairs; labels are class numbers or names."""

    name = "text-classification"
    metric_name = "accuracy"
    metrics = CLASS_METRICS
    further_metrics = FURTHER_CLASS_METRICS
    has_classes = True

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        return check_classes(rows, config, self.metric_name)

    def label_reading(self, rows: list[Row], config: Any) -> LabelReading:
        return read_labels(labels_in(rows), config)

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        return class_head(require_labels(rows))

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        labels = None if labels_of(rows) is None else class_numbers(rows)
        return training_examples(self.tokenized(rows, processor, max_length), labels)

    def label_scores(self, outcomes: Outcomes, config: Any) -> dict[str, float]:
        return class_label_scores(outcomes, config)

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return right_and_wrong_class(outcomes, self.metric_name)

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        return class_outcomes(self.predict(function, data), data.rows)


def check_classes(rows: list[Row], config: Any, metric: str) -> list[Row]:
    """Rows as by :func:`check_class_labels`, with ``label_names`` by number where a metric is of one of them.

    Raises:
        DataError: as that.
        RecipeError: a model of such classes does not have this metric.
    """
    if metric == "f1" and config.num_labels != 2:
        raise RecipeError(
            f"expected two classes for model.metric f1, which is that of class 1, found {config.num_labels}; set "
            "macro_f1, weighted_f1 or f1:LABEL"
        )
    checked = check_class_labels(rows, config)
    if label_of(metric) is None:
        return checked
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    check_label(metric, names)
    return [{**row, "label_names": names} if "label" in row else row for row in checked]


def class_label_scores(outcomes: Outcomes, config: Any) -> dict[str, float]:
    """F1 of the classes that are label or prediction of an example, by name."""
    return {str(config.id2label[number]): score for number, score in class_f1(outcomes).items()}


def right_and_wrong_class(outcomes: Outcomes, metric: str) -> Outcomes:
    """Two examples of the most frequent class, or of the metric's own, one of them taken for the next most frequent."""
    classes, times = np.unique(outcomes["label"], return_counts=True)
    by_frequency = [int(label) for label in classes[np.argsort(-times, kind="stable")]]
    own = label_number(metric, outcomes)
    first = by_frequency[0] if own is None else own
    others = [label for label in by_frequency if label != first]
    return Outcomes({"label": np.array([first, first]), "predicted": np.array([first, others[0] if others else -1])})


def class_outcomes(logits: np.ndarray, rows: list[Row]) -> Outcomes:
    """``label`` and ``predicted``, class numbers, of logits ``[n, classes]``; raises as :func:`class_numbers`."""
    names = tuple(rows[0].get("label_names", ())) if rows else ()
    return Outcomes({"label": np.array(class_numbers(rows)), "predicted": logits.argmax(axis=1)}, names)
