"""Scores of single texts and of pairs by a head with one output, judged by rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import ModelConfig, TaskName
from ziplm_deploy.tasks.batching import Batch, training_examples
from ziplm_deploy.tasks.classification import TextTask
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.labels import labels_of, require_labels
from ziplm_deploy.tasks.losses import binary_cross_entropy, mean_squared, sampled_direction
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.scores import CORRELATIONS, parse_score, value_outcomes


class TextRegression(TextTask):
    """Labels are floats in the data's own scale, which is also that of the output ``logits`` [batch, 1].

    An activation that the model has over its output, as cross-encoders have Sigmoid, stands between the two: scores and
    loss are of what it makes of the output, divergences are of the output itself.
    """

    name: ClassVar[TaskName] = "text-regression"
    metric_name = "spearman"
    metrics = CORRELATIONS
    label_columns = ("label", "labels", "score", "similarity")

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._activation_name = model.score_activation or "Identity"
        self._activation: nn.Module = getattr(nn, self._activation_name)()

    def read_label(self, value: int | float | str, number: int) -> float:
        return parse_score(value, number, "score")

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        """The rows; raises :class:`DataError` for a head with more outputs than one."""
        if config.num_labels != 1:
            raise DataError(
                f"expected a head with one output for {self.name}, found one with {config.num_labels}; set "
                "model.task to text-classification if these are classes, or use a model with num_labels 1"
            )
        return rows

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        self._check_reachable(require_labels(rows))
        return {"num_labels": 1, "problem_type": "regression"}

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        labels = labels_of(rows)
        self._check_reachable(labels or [])
        examples = self.tokenized(rows, processor, max_length)
        return training_examples(examples, None if labels is None else [float(label) for label in labels])

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        outputs = torch.from_numpy(self.predict(function, data)[:, 0].astype(np.float64))
        predicted = self._activation(outputs).numpy()
        return value_outcomes(predicted, np.array([row["label"] for row in data.rows], dtype=np.float64))

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """Mean squared difference of outputs [batch, 1], in the scale of the labels squared."""
        return mean_squared(candidate, dense)

    def sampled_loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return math.sqrt(2) * sampled_direction(features, generator)  # the square has twice the Hessian of its half

    def distillation_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean squared difference; a temperature has no meaning here."""
        return self.divergence(student, teacher.detach())

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean squared error, in the scale of the labels squared; under Sigmoid cross-entropy, in nats."""
        (labels,) = self.labels(batch)
        scores = outputs["logits"].squeeze(-1)  # [batch, 1] → [batch]
        if self._activation_name != "Sigmoid":
            return mean_squared(self._activation(scores), labels)
        return binary_cross_entropy(scores, labels)

    def _check_reachable(self, labels: Sequence[float | int | str]) -> None:
        """Raise :class:`DataError` for labels that Sigmoid cannot reach; before a training, not in it."""
        beyond = [float(label) for label in labels if not 0 <= float(label) <= 1]
        if self._activation_name == "Sigmoid" and beyond:
            raise DataError(
                f"expected labels of 0 to 1 for a model with Sigmoid over its score, found {beyond[0]:g}; scale them, "
                "or set model.score_activation to Identity"
            )
