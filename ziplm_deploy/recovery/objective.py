"""The student as the loss sees it, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ziplm_deploy.recipe import RecoverConfig
from ziplm_deploy.recovery.adapters import adapters_of
from ziplm_deploy.recovery.losses import LayerOutputs, token_loss
from ziplm_deploy.recovery.teacher import Teacher
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch


class Student(nn.Module):
    """A model as the loss sees it: features, named outputs, and packed hidden states of the given layers."""

    def __init__(self, model: nn.Module, task: Task, layers: Sequence[int], dropout: bool) -> None:
        super().__init__()
        self.model, self.task, self.layers, self._dropout = model, task, list(layers), dropout

    @property
    def learned(self) -> nn.Module:
        """The part that training changes, and checkpoints hold: adapters where the model has some, else all of it."""
        return adapters_of(self.model) or self.model

    def train(self, mode: bool = True) -> Student:
        """Set the mode; a student without dropout stays in evaluation mode, and gradients flow all the same."""
        return super().train(mode and self._dropout)

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        with LayerOutputs(self.model, self.layers) as recorded:
            outputs = self.task.forward(self.model, batch)
        hidden = recorded.packed(batch.get("attention_mask"))
        return {"outputs": outputs, "features": self.task.distilled(outputs, batch), "hidden": hidden}


@dataclass(frozen=True)
class Objective:
    """Weights of the three losses; without a teacher only the task's own loss."""

    task: Task
    task_weight: float = 1.0
    logit_weight: float = 0.0
    token_weight: float = 0.0
    temperature: float = 1.0
    teacher: Teacher | None = None

    @classmethod
    def from_config(cls, config: RecoverConfig, task: Task, teacher: Teacher) -> Objective:
        return cls(task, config.task_weight, config.logit_weight, config.token_weight, config.temperature, teacher)

    def __call__(self, answer: dict[str, Any], batch: Batch, positions: Tensor, layers: Sequence[int]) -> Tensor:
        """Scalar loss of a student's answer to ``batch``; ``layers`` are those of ``answer["hidden"]``."""
        total = torch.zeros((), device=positions.device)
        if self.task_weight:
            total = total + self.task_weight * self.task.task_loss(answer["outputs"], batch)
        if self.teacher is None:
            return total
        if not self.task_weight and not self.logit_weight:
            total = total + 0.0 * answer["features"].float().sum()  # several processes want a gradient for every weight
        if not self.logit_weight and not (self.token_weight and layers):
            return total
        wanted = self.teacher(batch, positions)
        if self.logit_weight:
            distance = self.task.distillation_loss(answer["features"], wanted.features, self.temperature)
            total = total + self.logit_weight * distance
        if self.token_weight and layers:
            hidden = dict(zip(self.teacher.layers, wanted.hidden, strict=True))
            total = total + self.token_weight * token_loss(answer["hidden"], [hidden[k] for k in layers])
        return total
