"""One pruned member trained back towards its teacher, from the folder of the pruned model into that of the member."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.member_files import load
from ziplm_deploy.models.modules import dense_modules, prunable_modules
from ziplm_deploy.recipe import TrainConfig
from ziplm_deploy.recovery.losses import remaining_layers
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.recovery.training import train
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import save_checkpoint

RECORD = "training.json"


LOSS_FIELDS = {"task_weight", "logit_weight", "token_weight", "temperature", "dropout", "freeze_embeddings"}


def recover_member(state: Run, name: str) -> None:
    """Train the pruned model of a member and save it in the member's folder, with ``training.json``."""
    config, source = state.recipe.recover, state.folder.pruned(name)
    key = recovery_key(state, name)
    folder = state.folder.member(name)

    def work() -> None:
        model = load(source)
        if _is_teacher(state, model):  # rounding in the teacher's answers would be all that there is to learn
            result = TrainingRecord(
                device="none", steps=0, examples_per_step=0, seconds=0.0, samples_per_second=0.0, losses=[]
            )
            state.progress.note(f"{name}: nothing was pruned, so it is not trained")
            if distributed.is_first():
                save_checkpoint(state, folder, model, {"member": name, "recovery": config.mode})
                result.save(folder / RECORD)
            return
        checkpoints = state.folder.path / "recovery" / f"{name}-{key[:12]}"
        result = distil(state, model, config, checkpoints, name)
        if distributed.is_first():
            save_checkpoint(state, folder, model, {"member": name, "recovery": config.mode})
            result.save(folder / RECORD)
            shutil.rmtree(checkpoints.parent, ignore_errors=True)

    state.folder.stage(f"recover {name}", key, [folder / "pruned.safetensors", folder / RECORD], work, together=True)


def _is_teacher(state: Run, model: nn.Module) -> bool:
    """Whether a member is the dense model itself, which is its teacher."""
    whole = {module.name: module.structures for module in dense_modules(model)}
    now = {module.name: module.structures for module in prunable_modules(model)}
    return now == whole and state.recipe.recover.teacher is None and not state.recipe.recover.task_weight


def recovery_key(state: Run, name: str) -> str:
    """Everything that a trained member depends on."""
    return training_key(state, state.recipe.recover, state.file_hash(state.folder.pruned(name) / "pruned.safetensors"))


def training_key(state: Run, config: TrainConfig, source: str = "") -> str:
    """What a training depends on; ``source`` stands for the weights it begins with."""
    recipe, unread = state.recipe, {"mode", "teacher", "teacher_cache_gb", "save_steps", "report_to"}
    losses = {} if config is recipe.recover else {"losses": recipe.recover.model_dump(include=LOSS_FIELDS)}
    return content_key(
        source=source,
        teacher=state.teacher_hash,
        data=state.train_hash,
        columns=state.train_columns,
        recover=config.model_dump(exclude=unread),
        **losses,
        task=state.model_settings,
        seq_len=recipe.environment.workload.seq_len,
        seed=recipe.seed,
    )


def distil(state: Run, model: nn.Module, config: TrainConfig, checkpoints: Path, title: str) -> TrainingRecord:
    """Train ``model`` in place towards the teacher's answers, by the losses of the recipe's ``recover`` section."""
    losses = state.recipe.recover
    frozen = list(model.get_input_embeddings().parameters()) if losses.freeze_embeddings else []  # type: ignore[operator]
    for parameter in frozen:
        parameter.requires_grad_(False)
    student = Student(model, state.task, remaining_layers(model) if losses.token_weight else [], losses.dropout)
    objective = Objective.from_config(losses, state.task, state.teacher)
    result = train(
        student,
        objective,
        state.examples,
        config,
        checkpoints,
        seed=state.recipe.seed,
        progress=state.progress,
        title=title,
    )
    model.cpu().requires_grad_(True)
    state.progress.note(f"{title}: {result.steps} steps, {result.samples_per_second:.0f} examples a second")
    return result
