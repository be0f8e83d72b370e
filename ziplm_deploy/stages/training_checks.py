"""Whether a run's training can work, found out before any long work."""

from __future__ import annotations

import torch
from torch import nn

from ziplm_deploy.errors import DataError, RecipeError, UsageError
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.recipe import RecoverConfig, TrainConfig
from ziplm_deploy.run.run import Run


def check_training(state: Run) -> None:
    """Refuse settings of ``dense``, ``recover`` and ``compress.train`` that cannot work.

    Raises:
        RecipeError: a task loss where the task has none.  DataError: no labels for it, or less than a batch.
        UsageError: the teacher does not fit.
    """
    recipe = state.recipe
    if recipe.dense.train:
        _check_training(state, recipe.dense, "dense")
        _check_dense(state)
    if state.trains:
        _check_training(state, recipe.recover, "recover")
    if recipe.compress.trains:
        _check_training(state, recipe.compress.train, "compress.train")
    if state.trains or recipe.compress.trains:
        _check_recovery(state)


def _check_training(state: Run, config: TrainConfig, section: str) -> None:
    batch, n_rows = config.batch_size * distributed.n_processes(), len(state.raw_train_rows)
    if n_rows < batch:
        raise DataError(
            f"expected at least one batch of {batch} training examples, found {n_rows}; give more data in data.train "
            f"or a smaller {section}.batch_size"
        )
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError(
            f"expected {section}.precision fp32 or bf16 on a machine without a GPU, found fp16; change the recipe"
        )


def _check_recovery(state: Run) -> None:
    config = state.recipe.recover
    if config.task_weight and not state.task.label_names:
        raise RecipeError(
            f"expected recover.task_weight: 0 for {state.recipe.model.task}, which has no loss of its own here, found "
            f"{config.task_weight:g}; distillation needs no labels"
        )
    if config.task_weight and not _labelled(state):
        raise DataError(
            f"expected labels in the training data for recover.task_weight {config.task_weight:g}, found none; give "
            "labelled data in data.train or set recover.task_weight: 0"
        )
    if config.teacher is not None:
        check_teacher(load_teacher(state), state.dense, config, state.recipe.environment.workload.seq_len)


def _labelled(state: Run) -> bool:
    example = state.task.examples(state.train_rows[:1], state.processor, state.recipe.environment.workload.seq_len)[0]
    return all(name in example for name in state.task.label_names)


def load_teacher(state: Run) -> nn.Module:
    """The recipe's teacher; the dense model by default."""
    path = state.recipe.recover.teacher
    if path is None:
        return state.dense
    model, processor = load_dense(state.recipe.model.model_copy(update={"path": path, "revision": None}))
    if hasattr(processor, "get_vocab") and processor.get_vocab() != state.processor.get_vocab():
        raise UsageError(
            f"expected a teacher with the vocabulary of {state.recipe.model.path}, found another one in {path}: the "
            "same ids would mean other tokens; choose a teacher with the same tokenizer"
        )
    return model


def check_teacher(teacher: nn.Module, dense: nn.Module, config: RecoverConfig, seq_len: int) -> None:
    """Raise :class:`UsageError` unless the teacher's hidden states and outputs can be compared with the student's."""
    own, other = model_shape(dense.config), model_shape(teacher.config)  # type: ignore[arg-type]
    found = {"hidden_size": (own.hidden_size, other.hidden_size)}
    if config.token_weight:
        found["layers"] = (own.n_layers, other.n_layers)
    if config.logit_weight:
        found["num_labels"] = (getattr(dense.config, "num_labels", 0), getattr(teacher.config, "num_labels", 0))
    for name, (wanted, has) in found.items():
        if wanted != has:
            raise UsageError(
                f"expected a teacher with {name} {wanted} as the model, found {has}; choose another recover.teacher"
                + (", or set recover.token_weight: 0" if name == "layers" else "")
            )
    positions = getattr(teacher.config, "max_position_embeddings", seq_len)
    if positions < min(seq_len, getattr(dense.config, "max_position_embeddings", seq_len)):
        raise UsageError(
            f"expected a teacher that takes {seq_len} tokens, found one for {positions}; choose another "
            "recover.teacher, or a smaller environment.workload.seq_len"
        )
    labels, others = _label_names(dense), _label_names(teacher)
    if config.logit_weight and labels and others and labels != others:
        raise UsageError(
            f"expected a teacher with the labels {', '.join(labels)} in this order, found {', '.join(others)}; choose "
            "another recover.teacher, or set recover.logit_weight: 0"
        )


def _label_names(model: nn.Module) -> list[str]:
    """What the outputs of a classifier mean, lower case; empty where its configuration only numbers them."""
    known: dict[int, str] = getattr(model.config, "id2label", None) or {}
    names = [str(known[index]).lower() for index in sorted(known)]
    return [] if any(name.startswith("label_") for name in names) else names


def _check_dense(state: Run) -> None:
    rows, names = state.raw_train_rows, state.task.label_names
    state.task.head_settings(rows)
    if not names or not _labelled(state):
        raise DataError(
            f"expected labelled training data for dense.train with {state.recipe.model.task}, found none; give them in "
            "data.train, or a fine-tuned model and dense.train: false"
        )
