"""The teacher's cache against the teacher: the same answers, whatever was asked before."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.helpers.models import tiny_model
from tests.helpers.training import batch_of, made_examples
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.recovery.teacher import GROUP, Teacher, TeacherAnswers, _neighbours
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.evaluation_set import TOKENS_AT_ONCE

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize(
    "name", ["sentence-similarity", "text-classification", "question-answering", "token-classification", "fill-mask"]
)
def test_cached_answers_equal_the_teachers(tmp_path: Path, name: str) -> None:
    task, dense = get_task(name), tiny_model("bert", name)
    examples = made_examples(tmp_path, task)
    teacher = Teacher(dense, task, range(3), examples, 10**8)
    calls: list[int] = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    for positions in ([0, 5, 9], [1, 2, 30], list(range(len(examples)))):
        teacher(*batch_of(examples, positions))
    answered = (len(examples), math.ceil(len(examples) / GROUP))
    assert (teacher.n_cached, len(calls)) == answered
    batch, positions = batch_of(examples, [30, 5, 0])  # another composition, another padding
    remembered = teacher(batch, positions)
    assert (teacher.n_cached, len(calls)) == answered
    fresh = Teacher(dense, task, range(3), examples, 0)(batch, positions)
    torch.testing.assert_close(remembered.features, fresh.features, atol=1e-4, rtol=1e-4)
    for one, other in zip(remembered.hidden, fresh.hidden, strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=2e-3)  # float16


@pytest.mark.parametrize("causal", [True, False])
def test_windows_of_text_are_answered_a_few_at_a_time(causal: bool) -> None:
    """Every token of them has logits of the whole vocabulary."""
    lengths = [512, 40, 512, 512, 1024, 512, 4096, 512, *([30] * 80)]
    groups = _neighbours(lengths, TOKENS_AT_ONCE if causal else None)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert max(map(len, groups)) == GROUP
    longest = [max(lengths[row] for row in group) for group in groups]
    assert longest == sorted(longest)
    sizes = [len(group) * most for group, most in zip(groups, longest, strict=True) if len(group) > 1]
    assert (max(sizes) <= TOKENS_AT_ONCE) == causal
    assert [6] in groups or not causal


def equal(one: TeacherAnswers, other: TeacherAnswers) -> bool:
    return torch.equal(one.features, other.features) and all(map(torch.equal, one.hidden, other.hidden))


def test_an_answer_depends_on_the_example_alone(tmp_path: Path) -> None:
    """A resumed training asks for other batches first than the one that it goes on from."""
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(tmp_path, task, n=200)
    orders = torch.randperm(200).view(-1, 8).tolist()
    forwards, backwards = (Teacher(dense, task, range(3), examples, 10**8) for _ in range(2))
    batches = {index: batch_of(examples, order) for index, order in enumerate(orders)}
    first_time = {index: forwards(*batches[index]) for index in batches}
    for index in reversed(batches):
        assert equal(backwards(*batches[index]), first_time[index])
        assert equal(forwards(*batches[index]), first_time[index])


def test_the_size_of_the_cache_changes_nothing_but_last_digits(tmp_path: Path) -> None:
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(tmp_path, task)
    batch = batch_of(examples, [30, 5, 0])
    kept, uncached = (Teacher(dense, task, range(3), examples, size)(*batch) for size in (10**8, 0))
    for one, other in zip(kept.hidden, uncached.hidden, strict=True):
        assert torch.equal(other, other.half().float())  # rounded like those that are kept
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_answers_in_another_precision_are_not_taken_over(tmp_path: Path) -> None:
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(tmp_path, task)
    batch = batch_of(examples, [30, 5, 0])
    used, fresh = (Teacher(dense, task, range(3), examples, 10**8) for _ in range(2))
    used(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(used(*batch), fresh(*batch))


def test_the_teacher_answers_in_the_precision_of_the_training(tmp_path: Path) -> None:
    task, dense = get_task("text-classification"), tiny_model("bert", "text-classification")
    examples = made_examples(tmp_path, task)
    batch, positions = batch_of(examples, [30, 5, 0])
    seen: list[torch.dtype] = []
    layers_of(dense)[1].output.dense.register_forward_hook(lambda *call: seen.append(call[2].dtype))  # type: ignore[union-attr, operator]
    exact = Teacher(dense, task, range(3), examples, 0)(batch, positions)
    with torch.autocast("cpu", torch.bfloat16):
        teacher = Teacher(dense, task, range(3), examples, 10**8)
        found, remembered = teacher(batch, positions), teacher(batch, positions)
    # the group in the middle decides on the cache, the other one has an example of the batch; then there is the cache
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    for answers in (found, remembered):
        assert answers.features.dtype == torch.float32
        torch.testing.assert_close(answers.features, exact.features, atol=2e-2, rtol=2e-2)
        for one, other in zip(answers.hidden, exact.hidden, strict=True):
            torch.testing.assert_close(one.float(), other, atol=5e-2, rtol=2e-2)


def test_a_cache_that_is_too_small_is_not_begun(tmp_path: Path) -> None:
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    examples = made_examples(tmp_path, task)
    teacher = Teacher(dense, task, range(3), examples, 20_000)
    assert teacher.caching
    teacher(*batch_of(examples, [0, 1]))
    assert (teacher.caching, teacher.n_cached) == (False, 0)


def test_answers_beyond_float16_are_kept_in_float32(tmp_path: Path) -> None:
    task, dense = get_task("sentence-similarity"), tiny_model("bert")
    with torch.no_grad():
        layers_of(dense)[2].output.LayerNorm.bias.fill_(1e6)  # type: ignore[union-attr, operator]
    examples = made_examples(tmp_path, task)
    teacher = Teacher(dense, task, range(3), examples, 10**8)
    answers = teacher(*batch_of(examples, [0, 1]))
    assert teacher.n_cached > 0
    assert torch.isfinite(answers.hidden[2]).all()
    assert equal(answers, teacher(*batch_of(examples, [0, 1])))
    uncached = Teacher(dense, task, range(3), examples, 0)(*batch_of(examples, [0, 1]))
    torch.testing.assert_close(answers.hidden[2], uncached.hidden[2])
