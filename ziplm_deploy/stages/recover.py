"""Train the pruned models towards the teacher's answers, where the recipe asks for it."""

from __future__ import annotations

import copy

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.member_files import load, replace_member
from ziplm_deploy.recipe import TrainConfig
from ziplm_deploy.recovery.distillation import Distillation, is_unpruned
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.stage import Stage

LOSS_FIELDS = {"task_weight", "logit_weight", "token_weight", "temperature", "dropout", "freeze_embeddings"}
UNREAD_FIELDS = {"mode", "teacher", "teacher_cache_gb", "save_steps", "report_to"}


def recover(run: Run, generation: Generation) -> None:
    """Trained members of a generation."""
    if run.trains:
        for member in generation.members:
            recover_member(run, member)


def recover_member(run: Run, member: Member) -> None:
    """Train the pruned model of a member and save it in the member's folder, with ``training.json``."""
    config, key = run.recipe.recover, recovery_key(run, member)
    checkpoints = run.folder.checkpoints(member.name, key)

    def work() -> None:
        model = load(member.pruned_folder)
        if (
            is_unpruned(model) and not config.teaches_more_than_dense
        ):  # rounding in the teacher's answers would be all that there is to learn
            result = TrainingRecord.of_none()
            run.progress.note(f"{member.name}: nothing was pruned, so it is not trained")
        else:
            result = distillation(run).train(model, config, checkpoints, member.name)
        if distributed.is_first():
            extra = {"member": member.name, "recovery": config.mode}
            replace_member(member.folder, model, run.dense.processor, run.recipe.model, extra)
            result.save(member.training_record)

    outputs = [member.weights, member.training_record, member.folder]
    run.folder.make(f"recover {member.name}", key, outputs, work, together=True)
    run.folder.drop_checkpoints(member.name)


def train_dense_on(run: Run) -> None:
    """Train the dense model as long as the member that was trained most, beside the members: their fair reference."""
    config, member = run.recipe.recover, run.folder.dense_trained_on
    rounds = len(run.generations)
    key = content_key(training=training_key(run, config, run.dense.hash), rounds=rounds)

    def work() -> None:
        model = copy.deepcopy(run.dense.model)
        for index in range(rounds):
            checkpoints = run.folder.checkpoints(f"{member.name}-{index}", key)
            result = distillation(run).train(model, config, checkpoints, member.name)
        if distributed.is_first():
            replace_member(member.folder, model, run.dense.processor, run.recipe.model, {"member": member.name})
            result.save(member.training_record)

    outputs = [member.weights, member.training_record, member.folder]
    run.folder.make(f"recover {member.name}", key, outputs, work, together=True)
    for index in range(rounds):
        run.folder.drop_checkpoints(f"{member.name}-{index}")


def distillation(run: Run) -> Distillation:
    """What all trainings of a run have in common, by the losses of the recipe's ``recover`` section."""
    return Distillation(
        run.recipe.recover,
        run.task,
        teacher=lambda: run.teacher,
        examples=lambda: run.data.examples,
        seed=run.recipe.seed,
        progress=run.progress,
    )


def recovery_key(run: Run, member: Member) -> str:
    """Everything that a trained member depends on."""
    return training_key(run, run.recipe.recover, run.file_hash(member.pruned_weights))


def training_key(run: Run, config: TrainConfig, source: str = "") -> str:
    """Everything that a training depends on; ``source`` stands for the weights it begins with."""
    recipe = run.recipe
    # Without a teacher of its own the dense model's hash stands for its tokenizer and class names, too.
    inputs = {} if recipe.recover.teacher is None else {"inputs": run.dense.input_key}
    losses = {} if config is recipe.recover else {"losses": recipe.recover.model_dump(include=LOSS_FIELDS)}
    return content_key(
        source=source,
        teacher=run.teacher_hash,
        data=run.data.train_hash,
        columns=run.data.train_columns,
        recover={**config.model_dump(exclude=UNREAD_FIELDS), "precision": config.arithmetic},
        **losses,
        **inputs,
        task=run.model_settings,
        seq_len=recipe.environment.workload.seq_len,
        seed=recipe.seed,
    )


STAGE = Stage(
    "recover",
    lambda run, generation: f"distillation into {generation.names}",
    recover,
    shown=lambda recipe: recipe.recover.mode != "none",
)
