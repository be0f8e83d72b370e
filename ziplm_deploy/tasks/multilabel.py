"""Texts and pairs with any number of labels each, judged by F1 over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.batching import Batch, training_examples
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.classification import TextTask
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.label_metrics import check_label, label_number
from ziplm_deploy.tasks.label_reading import LabelReading, read_labels
from ziplm_deploy.tasks.labels import MULTI_LABEL, class_head, labels_in, labels_of, require_labels
from ziplm_deploy.tasks.losses import bernoulli_divergence, binary_cross_entropy, sampled_binary_cross_entropy
from ziplm_deploy.tasks.metrics import (
    Metric,
    entity_f1,
    macro_entity_f1,
    ratio_of_sums,
    right_and_wrong_entity,
    type_f1,
)
from ziplm_deploy.tasks.outcomes import Outcomes


class MultiLabelClassification(TextTask):
    """Labels are lists of names or numbers, or of zeros and ones, one for each class.

    A class is found where its logit is above 0, which is a probability of one half. After :meth:`check_labels` a label
    is a list of zeros and ones [classes], and rows carry ``label_names``, the model's names by number.
    """

    name = "multi-label-classification"
    metric_name = "micro_f1"
    metrics: Mapping[str, Metric] = {
        "micro_f1": entity_f1,
        "macro_f1": macro_entity_f1,
        "exact_match": ratio_of_sums("exact"),
    }
    has_classes = True
    label_kinds = (list,)

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        """Rows with zeros and ones; raises :class:`DataError` for labels or heads of another kind."""
        kind = getattr(config, "problem_type", None)
        if kind not in (None, MULTI_LABEL):
            raise DataError(
                f"expected a head for several labels a text, found problem_type {kind} in the model's config.json; set "
                "model.task to text-classification or text-regression"
            )
        ones = _zeros_and_ones(rows)
        reading = read_labels([] if ones else labels_in(rows), config)
        checked: list[Row] = []
        for number, row in enumerate(rows, 1):
            if "label" in row:
                size = len(reading.names)
                label = (
                    row["label"] if ones else _as_ones([reading.number(v, number) for v in row["label"]], size, number)
                )
                if len(label) != size:
                    raise DataError(
                        f"expected a zero or one for each of the model's {size} classes, found {len(label)} in row "
                        f"{number}; use a model whose head fits the data"
                    )
                row = {**row, "label": [int(value) for value in label], "label_names": list(reading.names)}
            checked.append(row)
        check_label(self.metric_name, reading.names)
        return checked

    def example_labels(self, row: Row) -> set[str]:
        return {name for name, one in zip(row["label_names"], row["label"], strict=True) if one}

    def label_reading(self, rows: list[Row], config: Any) -> LabelReading | None:
        return None if _zeros_and_ones(rows) else read_labels(labels_in(rows), config)

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        labels = require_labels(rows)
        classes = range(len(labels[0])) if _zeros_and_ones(rows) else labels_in(rows)
        return {**class_head(classes), "problem_type": MULTI_LABEL}

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """``labels`` [1, classes]: zeros and ones."""
        labels = labels_of(rows)
        if labels is not None:
            _check_names(rows)
        return training_examples(self.tokenized(rows, processor, max_length), labels)

    def label_scores(self, outcomes: Outcomes, config: Any) -> dict[str, float]:
        return type_f1(outcomes)

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        """``right``, ``found`` and ``expected`` [texts, classes]; ``exact`` [texts]: all classes right."""
        _check_names(data.rows)
        expected = np.array([row["label"] for row in data.rows])
        found = (self.predict(function, data) > 0).astype(np.int64)
        return Outcomes(
            {
                "right": found * expected,
                "found": found,
                "expected": expected,
                "exact": (found == expected).all(axis=1).astype(np.int64),
            },
            names=tuple(data.rows[0]["label_names"]),
        )

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        """Texts of the most frequent class alone, or of the metric's own, found in one of them."""
        arrays = right_and_wrong_entity(outcomes, label_number(self.metric_name, outcomes))
        return Outcomes({**arrays, "exact": np.array([1, 0])})

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """KL between the decisions on every class, which sees a shift of all logits as softmax does not."""
        return bernoulli_divergence(candidate, dense)

    def sampled_loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return sampled_binary_cross_entropy(features, generator)

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean binary cross-entropy over texts and classes."""
        (labels,) = self.labels(batch)
        return binary_cross_entropy(outputs["logits"], labels)


def _zeros_and_ones(rows: list[Row]) -> bool:
    """Whether the labels are one zero or one for each class, as many in all rows; else lists of classes."""
    labels = [row["label"] for row in rows if "label" in row]
    values = [value for label in labels for value in label]
    return (
        len({len(label) for label in labels}) == 1
        and len(labels[0]) > 1
        and all(not isinstance(value, (str, NamedClass)) and value in (0, 1) for value in values)
    )


def _as_ones(classes: list[int], size: int, number: int) -> list[int]:
    if len(set(classes)) < len(classes):
        raise DataError(
            f"expected each class once among the labels of row {number}, found {classes}; give names or numbers of "
            f"classes, or lists of {size} zeros and ones in all rows"
        )
    return [int(index in classes) for index in range(size)]


def _check_names(rows: list[Row]) -> None:
    if not all("label_names" in row for row in rows):
        raise DataError("expected rows with checked labels, found others; pass the rows that check_labels returned")
