"""Losses against closed forms, the teacher's cache against the teacher, and training itself on tiny models."""

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

from tests.helpers.models import labelled_rows, tiny_model, tiny_tokenizer
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


def made_examples(folder: Path, task: Task, n: int = 48) -> Examples:
    processor = tiny_tokenizer(folder)
    return Examples(task.examples(labelled_rows(task.name, n), processor, 32), task, processor)


def objective(task: Task, dense: nn.Module, examples: Examples, cache_bytes: int = 10**8, **weights: Any) -> Objective:
    config = RecoverConfig(**weights)
    return Objective.from_config(
        config, task, Teacher(dense, task, range(3), len(examples), examples.n_tokens, cache_bytes)
    )


def batch_of(examples: Examples, positions: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    batch = examples.collate([examples[index] for index in positions])
    return batch, batch.pop("position")


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


@pytest.mark.parametrize(
    "name", ["sentence-similarity", "text-classification", "question-answering", "token-classification", "fill-mask"]
)
def test_cached_answers_equal_the_teachers(tmp_path: Path, name: str) -> None:
    task, dense = get_task(name), tiny_model("bert", name)
    examples = made_examples(tmp_path, task)
    teacher = Teacher(dense, task, range(3), len(examples), examples.n_tokens, 10**8)
    calls: list[int] = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    for positions in ([0, 5, 9], [1, 2, 30]):
        teacher(*batch_of(examples, positions))
    assert (teacher.n_cached, len(calls)) == (6, 2)
    batch, positions = batch_of(examples, [30, 5, 0])  # another composition, another padding
    remembered = teacher(batch, positions)
    assert len(calls) == 2
    fresh = Teacher(dense, task, range(3), len(examples), examples.n_tokens, 0)(batch, positions)
    torch.testing.assert_close(remembered.features, fresh.features, atol=1e-4, rtol=1e-4)
    for one, other in zip(remembered.hidden, fresh.hidden, strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=2e-3)  # float16


def test_the_teacher_answers_in_the_precision_of_the_training(tmp_path: Path) -> None:
    task, dense = get_task("text-classification"), tiny_model("bert", "text-classification")
    examples = made_examples(tmp_path, task)
    batch, positions = batch_of(examples, [30, 5, 0])
    seen: list[torch.dtype] = []
    layers_of(dense)[1].output.dense.register_forward_hook(lambda *call: seen.append(call[2].dtype))  # type: ignore[union-attr, operator]
    exact = Teacher(dense, task, range(3), len(examples), examples.n_tokens, 0)(batch, positions)
    with torch.autocast("cpu", torch.bfloat16):
        teacher = Teacher(dense, task, range(3), len(examples), examples.n_tokens, 10**8)
        found, remembered = teacher(batch, positions), teacher(batch, positions)
    assert seen == [torch.float32, torch.bfloat16]  # and the second time from the cache
    for answers in (found, remembered):
        assert answers.features.dtype == torch.float32
        torch.testing.assert_close(answers.features, exact.features, atol=2e-2, rtol=2e-2)
        for one, other in zip(answers.hidden, exact.hidden, strict=True):
            torch.testing.assert_close(one.float(), other, atol=5e-2, rtol=2e-2)


def test_a_cache_that_is_too_small_is_not_begun(tmp_path: Path) -> None:
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(tmp_path, task)
    teacher = Teacher(dense, task, range(3), len(examples), examples.n_tokens, 20_000)
    assert teacher.caching
    teacher(*batch_of(examples, [0, 1]))
    assert (teacher.caching, teacher.n_cached) == (False, 0)


def test_answers_beyond_float16_are_not_cached(tmp_path: Path) -> None:
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    with torch.no_grad():
        layers_of(dense)[2].output.LayerNorm.bias.fill_(1e6)  # type: ignore[union-attr, operator]
    examples = made_examples(tmp_path, task)
    teacher = Teacher(dense, task, range(3), len(examples), examples.n_tokens, 10**8)
    answers = teacher(*batch_of(examples, [0, 1]))
    assert (teacher.caching, teacher.n_cached) == (False, 0)
    assert torch.isfinite(answers.hidden[2]).all()


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
    goal: Any = Objective.from_config(
        config, task, Teacher(dense, task, range(3), len(examples), examples.n_tokens, cache_bytes)
    )
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


def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    _, whole, _, _ = trained(tmp_path / "whole", 20, cache_bytes=0)
    with pytest.raises(Killed):
        trained(tmp_path, 20, change=killed_after(13), cache_bytes=0)
    broken = tmp_path / "ckpt" / "checkpoint-12"
    broken.mkdir()  # as if it had been killed while writing
    assert last_checkpoint(tmp_path / "ckpt") == tmp_path / "ckpt" / "checkpoint-10"
    assert not broken.exists()
    _, resumed, record, notes = trained(tmp_path, 20, cache_bytes=0)
    assert record.steps == 20
    assert "goes on from checkpoint-10" in notes.notes[0]
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("steps", [14, 18])
def test_a_training_in_a_later_epoch_is_resumed_exactly(tmp_path: Path, steps: int) -> None:
    """Twelve steps are an epoch; checkpoints stand at 5, 10 and 15."""

    _, whole, _, _ = trained(tmp_path / "whole", 25, cache_bytes=0)
    with pytest.raises(Killed):
        trained(tmp_path, 25, change=killed_after(steps), cache_bytes=0)
    _, resumed, record, _ = trained(tmp_path, 25, cache_bytes=0)
    assert record.steps == 25
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


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
