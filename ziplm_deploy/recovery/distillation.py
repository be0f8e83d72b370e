"""Training of a model towards its teacher's answers, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ziplm_deploy.models.modules import dense_modules, prunable_modules
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import RecoverConfig, TrainConfig
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.recovery.losses import remaining_layers
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.recovery.teacher import Teacher
from ziplm_deploy.recovery.training import train
from ziplm_deploy.tasks import Task


@dataclass(frozen=True)
class Distillation:
    """What all trainings of a run have in common. Teacher and examples are asked for when a training begins."""

    losses: RecoverConfig
    task: Task
    teacher: Callable[[], Teacher]
    examples: Callable[[], Examples]
    seed: int
    progress: Progress

    def train(self, model: nn.Module, config: TrainConfig, checkpoints: Path, title: str) -> TrainingRecord:
        """Train ``model`` in place; a training that was killed goes on from what ``checkpoints`` holds."""
        losses = self.losses
        frozen = list(model.get_input_embeddings().parameters()) if losses.freeze_embeddings else []  # type: ignore[operator]
        for parameter in frozen:
            parameter.requires_grad_(False)
        layers = remaining_layers(model) if losses.token_weight else []
        student = Student(model, self.task, layers, losses.dropout)
        objective = Objective.from_config(losses, self.task, self.teacher())
        result = train(
            student,
            objective,
            self.examples(),
            config,
            checkpoints,
            seed=self.seed,
            progress=self.progress,
            title=title,
        )
        model.cpu().requires_grad_(True)
        self.progress.note(f"{title}: {result.steps} steps, {result.samples_per_second:.0f} examples a second")
        return result


def is_unpruned(model: nn.Module) -> bool:
    """Whether every module has all its structures."""
    whole = {module.name: module.structures for module in dense_modules(model)}
    return whole == {module.name: module.structures for module in prunable_modules(model)}
