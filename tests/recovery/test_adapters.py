"""Adapters: trained alone, merged exactly, resumed as if nothing had happened, and gone in the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.models import output_tensors, tiny_causal_model, tiny_inputs, tiny_model, tiny_tokenizer
from tests.helpers.training import made_examples
from ziplm_deploy.models.modules import layer_linears
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import LoraConfig, ModelConfig, RecoverConfig
from ziplm_deploy.recovery import distillation
from ziplm_deploy.recovery.adapters import AdaptedLinear, Adapter, adapters_of, insert_adapters, merge_adapters
from ziplm_deploy.recovery.distillation import Distillation
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.recovery.teacher import Teacher
from ziplm_deploy.tasks import Task, get_task

pytestmark = pytest.mark.transformers

SMALL = {"1.attention": 1, "1.ffn": 24, "2.attention": 0, "2.ffn": 0}


class Killed(Exception):
    """Stands for a process that is killed."""


class Notes(Progress):
    def __init__(self, killed_at: int | None = None) -> None:
        self.notes: list[str] = []
        self._killed_at = killed_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int) -> None:
        if done == self._killed_at:
            raise Killed


def dense_model(kind: str) -> Any:
    return tiny_model("bert") if kind == "bert" else tiny_causal_model("llama", tie_word_embeddings=True)


def task_and_examples(folder: Path, kind: str) -> tuple[Task, Examples]:
    if kind == "bert":
        task = get_task("sentence-similarity")
        return task, made_examples(folder, task)
    task, processor = get_task(ModelConfig(path="x", task="text-generation")), tiny_tokenizer(folder)
    ids = torch.randint(5, 19, (48, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": each, "scored_from": 0} for each in ids]
    return task, Examples(task.examples(rows, processor, 12), task, processor)


def trained(
    folder: Path, kind: str, model: nn.Module, progress: Notes | None = None, steps: int = 7, **lora: Any
) -> TrainingRecord:
    """Train a pruned model of this kind, in place, by adapters."""
    task, examples = task_and_examples(folder / "words", kind)
    config = RecoverConfig(
        mode="one-shot",
        max_steps=steps,
        batch_size=8,
        learning_rate=3e-3,
        save_steps=3,
        lora=LoraConfig(**{"rank": 4, **lora}),
    )
    teacher = Teacher(dense_model(kind), task, range(3), examples, 10**8)
    shared = Distillation(config, task, lambda: teacher, lambda: examples, seed=0, progress=progress or Notes())
    return shared.train(model, config, folder / "ckpt", "2x")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["bert", "llama"])  # with biases; causal, without them, embeddings tied
def test_a_merged_model_answers_as_the_adapted_one_and_nothing_else_has_changed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_resized(dense_model(kind), SMALL)
    inputs, before, linears = tiny_inputs(model), state(model), set(layer_linears(model))
    plain, adapted = output_tensors(model, inputs), {}

    def merge(given: nn.Module) -> None:
        adapted.update(output_tensors(given, inputs))
        now = given.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), "a frozen weight moved"
        merge_adapters(given)

    monkeypatch.setattr(distillation, "merge_adapters", merge)
    record = trained(tmp_path, kind, model)
    assert (record.steps, record.lora_rank) == (7, 4)
    for name, answer in output_tensors(model, inputs).items():
        torch.testing.assert_close(answer, adapted[name], rtol=1e-5, atol=1e-5)
        assert float((answer - plain[name]).abs().max()) > 1e-3
    after = state(model)
    assert after.keys() == before.keys()
    assert {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])} == linears
    assert not len(adapters_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    if kind == "llama":
        head: Any = model
        assert head.lm_head.weight is head.model.embed_tokens.weight


def test_checkpoints_and_optimizer_hold_adapters_alone(tmp_path: Path) -> None:
    model = random_resized(dense_model("llama"), SMALL)
    wanted = sum(min(4, *linear.weight.shape) * sum(linear.weight.shape) for linear in layer_linears(model).values())
    record = trained(tmp_path, "llama", model, steps=6)
    assert record.trained_parameters == wanted
    checkpoint = tmp_path / "ckpt" / "checkpoint-6"
    tensors = load_file(checkpoint / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"down", "up"}
    assert sum(tensor.numel() for tensor in tensors.values()) == wanted
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    assert sum(each["exp_avg"].numel() for each in states) == wanted


def test_a_killed_training_of_adapters_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    pruned = random_resized(dense_model("llama"), SMALL)
    whole, killed, resumed = (copy.deepcopy(pruned) for _ in range(3))
    trained(tmp_path / "whole", "llama", whole)
    with pytest.raises(Killed):
        trained(tmp_path, "llama", killed, Notes(killed_at=5))
    notes = Notes()
    trained(tmp_path, "llama", resumed, notes)
    assert "goes on from checkpoint-3" in notes.notes[0]
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_an_adapted_model_begins_with_its_own_answers_and_draws_no_number_of_others() -> None:
    model = dense_model("llama")
    inputs = tiny_inputs(model)
    plain = output_tensors(model, inputs)["logits"]
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first = insert_adapters(model, LoraConfig(rank=4), seed=5)
    assert torch.equal(torch.rand(2), wanted)
    assert torch.equal(output_tensors(model, inputs)["logits"], plain)
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".adapter." not in name] == []
    again = insert_adapters(dense_model("llama"), LoraConfig(rank=4), seed=5)
    assert all(torch.equal(one.down, other.down) for one, other in zip(first, again, strict=True))
    other = insert_adapters(dense_model("llama"), LoraConfig(rank=4), seed=6)
    assert not torch.equal(first[0].down, other[0].down)


def test_alpha_weighs_the_change() -> None:
    assert {each.scale for each in insert_adapters(dense_model("bert"), LoraConfig(rank=4, alpha=8.0), seed=0)} == {2.0}
    linear = nn.Linear(6, 5)
    adapted = AdaptedLinear(linear, Adapter(linear, 3, scale=0.5))
    with torch.no_grad():
        adapted.adapter.up.normal_()
        x = torch.randn(2, 7, 6)
        expected = x @ (linear.weight + 0.5 * adapted.adapter.up @ adapted.adapter.down).T + linear.bias
        torch.testing.assert_close(adapted(x), expected)


def test_linears_narrower_than_the_rank_get_their_own(tmp_path: Path) -> None:
    model, notes = random_resized(dense_model("llama"), {"1.ffn": 3}), Notes()
    trained(tmp_path, "llama", model, notes, steps=3, rank=8)
    assert notes.notes[0] == ("2x: 3 of 21 linears are narrower than rank 8, so that their adapters have a smaller one")
    ranks = [len(adapter.down) for adapter in insert_adapters(model, LoraConfig(rank=8), seed=0)]
    assert sorted(ranks) == [3] * 3 + [8] * 18


def test_a_model_without_linears_is_left_as_it_is(tmp_path: Path) -> None:
    model = random_resized(dense_model("llama"), {f"{k}.{kind}": 0 for k in range(3) for kind in ("attention", "ffn")})
    before, notes = state(model), Notes()
    assert trained(tmp_path, "llama", model, notes) == TrainingRecord.of_none()
    assert "no linear is left that an adapter could change" in notes.notes[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "ckpt").exists()
