"""Losses against closed forms, and training itself on tiny models."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import tiny_model
from tests.helpers.training import batch_of, made_examples
from ziplm_deploy.errors import DataError, EnvironmentMismatchError, NumericalError, RecipeError, StorageError
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import ModelConfig, RecoverConfig
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.recovery.losses import LayerOutputs, remaining_layers, token_loss
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.teacher import Teacher
from ziplm_deploy.recovery.training import last_checkpoint, total_steps, train, training_arguments
from ziplm_deploy.tasks import Task, get_task

pytestmark = pytest.mark.transformers

SMALL = {"1.attention": 2, "1.ffn": 24, "2.attention": 0, "2.ffn": 0}


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def objective(task: Task, dense: nn.Module, examples: Examples, cache_bytes: int = 10**8, **weights: Any) -> Objective:
    config = RecoverConfig(**weights)
    return Objective.from_config(config, task, Teacher(dense, task, range(3), examples, cache_bytes))


def test_token_loss_is_the_scale_free_mean_squared_error() -> None:
    teacher = [torch.randn(7, 5), 100 * torch.randn(7, 5)]
    assert float(token_loss(teacher, teacher)) == 0.0
    assert float(token_loss([torch.zeros(7, 5)] * 2, teacher)) == pytest.approx(1.0, rel=1e-3)
    student = [h + 0.1 * h for h in teacher]
    assert float(token_loss(student, teacher)) == pytest.approx(0.01, rel=1e-3)


def test_padding_is_not_in_the_recorded_hidden_states() -> None:
    model = tiny_model("bert")
    ids, mask = torch.randint(5, 19, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    hooks = list(layers_of(model)[0]._forward_hooks)  # transformers 5 has some of its own
    with LayerOutputs(model, [0, 2]) as recorded, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    packed = recorded.packed(mask)
    assert [tuple(h.shape) for h in packed] == [(9, 32)] * 2
    for h, k in zip(packed, (1, 3), strict=True):
        torch.testing.assert_close(h, expected[k][mask.bool()])
    assert list(layers_of(model)[0]._forward_hooks) == hooks


def test_only_layers_with_something_left_are_compared() -> None:
    dense = tiny_model("bert")
    assert remaining_layers(dense) == [0, 1, 2]
    assert remaining_layers(random_resized(dense, SMALL)) == [0, 1]


def test_the_loss_of_the_dense_model_against_itself_is_zero_and_that_of_a_pruned_one_is_not(tmp_path: Path) -> None:
    task, dense = get_task("text-classification"), tiny_model("bert", "text-classification")
    examples = made_examples(tmp_path, task)
    goal = objective(task, dense, examples)
    batch, positions = batch_of(examples, [3, 4, 5])
    for model, zero in ((copy.deepcopy(dense), True), (random_resized(dense, SMALL), False)):
        student = Student(model, task, remaining_layers(model), dropout=False).train()
        loss = goal(student(**batch), batch, positions, student.layers)
        assert (abs(float(loss.detach())) < 1e-4) == zero


def test_the_task_loss_is_one_part_of_the_sum(tmp_path: Path) -> None:
    task, dense = get_task("text-classification"), tiny_model("bert", "text-classification")
    examples = made_examples(tmp_path, task)
    batch, positions = batch_of(examples, [3, 4, 5])
    student = Student(random_resized(dense, SMALL), task, [0, 1], dropout=False)

    def value(**weights: float) -> float:
        return float(objective(task, dense, examples, **weights)(student(**batch), batch, positions, [0, 1]))

    with torch.no_grad():
        parts = [
            value(task_weight=1, logit_weight=0, token_weight=0),
            value(task_weight=0, logit_weight=1, token_weight=0),
            value(task_weight=0, logit_weight=0, token_weight=1),
        ]
        expected = torch.nn.functional.cross_entropy(student(**batch)["outputs"]["logits"], batch["labels"])
        assert parts[0] == pytest.approx(float(expected), rel=1e-5)
        assert value(task_weight=2, logit_weight=3, token_weight=5) == pytest.approx(
            2 * parts[0] + 3 * parts[1] + 5 * parts[2], rel=1e-4
        )


def test_dropout_is_off_unless_asked_for() -> None:
    dense, task = tiny_model("bert"), get_task("sentence-similarity")
    assert not Student(dense, task, [], dropout=False).train().model.training
    assert Student(dense, task, [], dropout=True).train().model.training


def trained(
    folder: Path,
    steps: int,
    *,
    change: Callable[[Objective], Any] | None = None,
    cache_bytes: int = 10**8,
    **settings: Any,
) -> tuple[nn.Module, nn.Module, Any, Notes]:
    """(dense, student model, record, progress) after ``steps`` steps of label-free distillation."""
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(folder, task)
    config = RecoverConfig(**{"max_steps": steps, "batch_size": 8, "learning_rate": 3e-3, "save_steps": 5, **settings})
    model = random_resized(dense, SMALL)
    student = Student(model, task, remaining_layers(model), dropout=False)
    goal: Any = Objective.from_config(config, task, Teacher(dense, task, range(3), examples, cache_bytes))
    goal = change(goal) if change else goal
    notes = Notes()
    record = train(student, goal, examples, config, folder / "ckpt", seed=0, progress=notes, title="2x")
    return dense, model, record, notes


def test_training_brings_a_pruned_model_closer_and_says_what_it_took(tmp_path: Path) -> None:
    _, _, record, notes = trained(tmp_path, 60)
    assert record.steps == 60
    assert record.losses[-1][1] < 0.7 * record.losses[0][1]
    assert record.samples_per_second > 0
    assert "60 steps of 8 examples" in notes.notes[0]
    assert "measured" in notes.notes[0]
    assert notes.steps[-1] == (60, 60)


def test_the_estimate_before_training_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.recovery import training

    _, one, _, _ = trained(tmp_path / "a", 5)
    monkeypatch.setattr(training, "_eta", lambda trainer, total: "unknown")
    _, other, _, _ = trained(tmp_path / "b", 5)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


class Killed(Exception):
    """Stands for a process that is killed."""


def killed_after(steps: int) -> Callable[[Objective], Any]:
    """A change of the objective: after so many steps of training it raises :class:`Killed`."""

    def change(goal: Objective) -> Any:
        calls = []

        def lossy(*args: Any) -> Tensor:
            calls.append(1)
            if len(calls) > 8 + steps:  # the estimate takes 8
                raise Killed
            return goal(*args)

        lossy.teacher = goal.teacher  # type: ignore[attr-defined]
        return lossy

    return change


CACHES = pytest.mark.parametrize("cache_bytes", [0, 20_000, 10**8], ids=["no cache", "too small", "cache"])


@CACHES
def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(tmp_path: Path, cache_bytes: int) -> None:
    _, whole, _, _ = trained(tmp_path / "whole", 20, cache_bytes=cache_bytes)
    with pytest.raises(Killed):
        trained(tmp_path, 20, change=killed_after(13), cache_bytes=cache_bytes)
    broken = tmp_path / "ckpt" / "checkpoint-12"
    broken.mkdir()  # as if it had been killed while writing
    assert last_checkpoint(tmp_path / "ckpt") == tmp_path / "ckpt" / "checkpoint-10"
    assert not broken.exists()
    _, resumed, record, notes = trained(tmp_path, 20, cache_bytes=cache_bytes)
    assert record.steps == 20
    assert "goes on from checkpoint-10" in notes.notes[0]
    assert_same(whole, resumed)


@CACHES
@pytest.mark.parametrize("steps", [14, pytest.param(18, marks=pytest.mark.slow)])
def test_a_training_in_a_later_epoch_is_resumed_exactly(tmp_path: Path, steps: int, cache_bytes: int) -> None:
    """Twelve steps are an epoch; checkpoints stand at 5, 10 and 15."""

    _, whole, undisturbed, _ = trained(tmp_path / "whole", 25, cache_bytes=cache_bytes)
    with pytest.raises(Killed):
        trained(tmp_path, 25, change=killed_after(steps), cache_bytes=cache_bytes)
    _, resumed, record, _ = trained(tmp_path, 25, cache_bytes=cache_bytes)
    assert record.steps == 25
    assert record.losses == undisturbed.losses
    assert [step for step, _ in record.losses] == [5, 10, 15, 20, 25]
    assert_same(whole, resumed)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@CACHES
def test_a_member_is_the_same_after_another_one_and_in_a_process_of_its_own(tmp_path: Path, cache_bytes: int) -> None:
    """A run that is killed between two members has nothing in its cache for the second one."""
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(tmp_path, task)
    config = RecoverConfig(max_steps=10, batch_size=8, learning_rate=3e-3)

    def member(teacher: Teacher, name: str, sizes: dict[str, int]) -> nn.Module:
        model = random_resized(dense, sizes)
        goal = Objective.from_config(config, task, teacher)
        student = Student(model, task, remaining_layers(model), dropout=False)
        train(student, goal, examples, config, tmp_path / name, seed=0, progress=Notes(), title=name)
        return model

    used, fresh = (Teacher(dense, task, range(3), examples, cache_bytes) for _ in range(2))
    member(used, "1.5x", {"1.ffn": 24})
    assert_same(member(used, "2x", SMALL), member(fresh, "2x again", SMALL))


def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()

    def sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.add(f"{path.parent.name}/{path.name}")
        if path.parent.name == "checkpoint-10":
            assert (path.parent.parent / "checkpoint-5").exists()

    monkeypatch.setattr(os, "fsync", sync)
    trained(tmp_path, 10)
    [checkpoint] = (tmp_path / "ckpt").glob("checkpoint-*")
    written = {f"{path.parent.name}/{path.name}" for path in checkpoint.iterdir()}
    assert "checkpoint-10/trainer_state.json" in written
    assert written <= synced


def test_a_finished_training_that_was_not_saved_is_taken_as_it_is(tmp_path: Path) -> None:
    _, first, _, _ = trained(tmp_path, 12)
    _, again, record, notes = trained(tmp_path, 12)
    assert (record.steps, record.samples_per_second) == (12, 0.0)
    assert len(notes.notes) == 1
    assert "goes on from checkpoint-12" in notes.notes[0]
    for (name, p), q in zip(first.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_precision_is_that_of_the_recipe_whatever_was_trained_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision, expected in (("bf16", "bf16"), ("fp32", "no")):
        training_arguments(RecoverConfig(precision=precision), tmp_path, 0)
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == expected


def test_logs_outlive_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    arguments = training_arguments(RecoverConfig(), tmp_path / "recovery" / "2x-abc", 0)
    logs = getattr(arguments, "logging_dir", os.environ["TENSORBOARD_LOGGING_DIR"])
    assert logs == str(tmp_path / "logs" / "2x-abc")


def test_a_loss_that_becomes_nan_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def poisoned(goal: Objective) -> Any:
        calls = []

        def nan(*args: Any) -> Tensor:
            calls.append(1)
            return goal(*args) * (float("nan") if len(calls) > 8 + 7 else 1.0)

        nan.teacher = goal.teacher  # type: ignore[attr-defined]
        return nan

    with pytest.raises(NumericalError, match=r"found nan in step 8.*checkpoint-5 is kept"):
        trained(tmp_path, 20, change=poisoned)
    kept = last_checkpoint(tmp_path / "ckpt")
    assert kept is not None
    assert kept.name == "checkpoint-5"


def test_a_full_disk_while_checkpointing_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.recovery import training

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "save_model", full)
    with pytest.raises(StorageError, match="free disk space"):
        trained(tmp_path, 10)


def test_other_failures_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.recovery import training

    def fail_with(error: Exception) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(training, "save_model", fail)

    fail_with(ConnectionError("the logger's server is away"))
    with pytest.raises(ConnectionError):
        trained(tmp_path, 10)
    fail_with(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    with pytest.raises(EnvironmentMismatchError, match="expected cpu to hold a step of"):
        trained(tmp_path, 10)


def test_a_logger_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="report_to, found 'carrier-pigeon'"):
        trained(tmp_path, 5, report_to="carrier-pigeon")


def test_less_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one batch of 128 training examples for 2x, found"):
        trained(tmp_path, 5, batch_size=128)


def test_steps_are_counted_from_epochs_unless_given() -> None:
    assert total_steps(RecoverConfig(epochs=1.5), 100, 32) == 6
    assert total_steps(RecoverConfig(max_steps=7), 100, 32) == 7


def test_a_teacher_that_no_loss_reads_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("bert", "text-classification")
    task = get_task(ModelConfig(path="x", task="text-classification"))
    examples = made_examples(tmp_path, task)
    batch, positions = batch_of(examples, [0, 1])
    student = Student(dense, task, [0, 1], dropout=False)
    asked: list[Tensor] = []
    monkeypatch.setattr(Teacher, "__call__", lambda teacher, batch, positions: asked.append(positions))
    labels_only = objective(task, dense, examples, task_weight=1.0, logit_weight=0.0, token_weight=0.0)
    with torch.no_grad():
        assert float(labels_only(student(**batch), batch, positions, student.layers)) > 0
    assert not asked
