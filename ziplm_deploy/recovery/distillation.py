"""Training of a model towards its teacher's answers, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ziplm_deploy.models.modules import dense_modules, layer_linears, prunable_modules
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import LoraConfig, RecoverConfig, TrainConfig
from ziplm_deploy.recovery.adapters import insert_adapters, merge_adapters
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
        """Train ``model`` in place; a training that was killed goes on from what ``checkpoints`` holds.

        With adapters, they are added to the weights in the end: whatever was trained, a plain model comes out.
        """
        losses = self.losses
        if losses.lora is not None and not layer_linears(model):
            self.progress.note(f"{title}: no linear is left that an adapter could change, so it is not trained")
            return TrainingRecord.of_none()
        self._choose_trained(model, title)
        n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
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
        merge_adapters(model.cpu())
        model.requires_grad_(True)
        self.progress.note(f"{title}: {result.steps} steps, {result.samples_per_second:.0f} examples a second")
        rank = None if losses.lora is None else losses.lora.rank
        return result.model_copy(update={"trained_parameters": n_trained, "lora_rank": rank})

    def _choose_trained(self, model: nn.Module, title: str) -> None:
        """Leave gradients to the parameters that the recipe wants trained."""
        if self.losses.lora is not None:
            self._adapt(model, self.losses.lora, title)
        elif self.losses.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]

    def _adapt(self, model: nn.Module, config: LoraConfig, title: str) -> None:
        adapters = insert_adapters(model, config, self.seed)
        narrower = sum(len(adapter.down) < config.rank for adapter in adapters)
        if narrower:
            self.progress.note(
                f"{title}: {narrower} of {len(adapters)} linears are narrower than rank {config.rank}, so that their "
                "adapters have a smaller one"
            )


def is_unpruned(model: nn.Module) -> bool:
    """Whether every module has all its structures."""
    whole = {module.name: module.structures for module in dense_modules(model)}
    return whole == {module.name: module.structures for module in prunable_modules(model)}
