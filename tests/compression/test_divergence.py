"""Divergence of a changed model: only layers from the first changed one on run again, and nothing else differs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.models import BLOCK_TYPES, default_task, random_entries, tiny_causal_model, tiny_inputs, tiny_model
from ziplm_deploy.compression.divergence import Divergence
from ziplm_deploy.models.modules import layer_linears, layers_of
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.tasks import Task, get_task

pytestmark = pytest.mark.transformers

SIZES = {"0.attention": 1, "0.ffn": 24, "1.attention": 0, "2.ffn": 0}
CAUSAL = ("llama", "gpt2", "opt", "gpt_neox")


def model_and_task(model_type: str) -> tuple[nn.Module, Task]:
    is_causal = model_type in CAUSAL
    task = "text-generation" if is_causal else default_task(model_type)
    return tiny_causal_model(model_type) if is_causal else tiny_model(model_type), get_task(
        ModelConfig(path="none", task=task)
    )


def batches_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(model, 2, 9, seed) for seed in range(2)]


@contextlib.contextmanager
def changed(module: Any) -> Iterator[None]:
    own = module.weight
    try:
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
        module.weight = nn.Parameter(own + 0.1 * noise)
        yield
    finally:
        module.weight = own


@contextlib.contextmanager
def runs_counted(layers: nn.ModuleList) -> Iterator[dict[int, int]]:
    counts = dict.fromkeys(range(len(layers)), 0)

    def counter(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    handles = [layer.register_forward_hook(counter(index)) for index, layer in enumerate(layers)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model_type", [*CAUSAL, *BLOCK_TYPES])
def test_layers_before_the_change_do_not_run(model_type: str) -> None:
    dense, task = model_and_task(model_type)
    for model in (dense, resize(dense, random_entries(dense, SIZES))):
        divergence, layers = Divergence(task, model, batches_of(model)), list(layers_of(model))
        assert divergence(model) == pytest.approx(0, abs=1e-6)
        for path, linear in layer_linears(model).items():
            first = next(index for index, layer in enumerate(layers) if linear in set(layer.modules()))
            with changed(linear):
                whole = divergence(model)
                with runs_counted(layers_of(model)) as counts:
                    found = divergence(model, [path])
            assert found == pytest.approx(whole, rel=1e-3, abs=1e-6)
            assert whole > 0
            assert counts == {index: 2 * (index >= first) for index in range(len(layers))}  # of two batches
        assert list(layers_of(model)) == layers
        assert divergence(model) == pytest.approx(0, abs=1e-6)


def test_a_changed_head_runs_no_layer_and_anything_else_all() -> None:
    model, task = model_and_task("llama")
    divergence = Divergence(task, model, batches_of(model))
    for path, runs in (("lm_head", 0), ("model.embed_tokens", 2)):
        with changed(model.get_submodule(path)), runs_counted(layers_of(model)) as counts:
            assert divergence(model, [path]) > 0
        assert set(counts.values()) == {runs}
    with changed(model.get_submodule("lm_head")):
        paths = ["lm_head", "model.layers.1.mlp.up_proj"]
        with runs_counted(layers_of(model)) as counts:
            assert divergence(model, paths) == pytest.approx(divergence(model, ["lm_head"]))
    assert counts == {0: 0, 1: 2, 2: 2}  # from the first of them on


@pytest.mark.parametrize(("share", "first_run"), [(1.0, 2), (0.5, 2), (0.3, 0), (0.0, 0)])
def test_states_keep_to_their_memory(share: float, first_run: int) -> None:
    model, task = model_and_task("llama")
    batches = batches_of(model)
    n_bytes = 4 * 2 * 9 * model.config.hidden_size * 4 * len(batches)  # of four states of either batch
    divergence = Divergence(task, model, batches, most_bytes=int(share * n_bytes))
    linear = "model.layers.2.mlp.down_proj"
    with changed(model.get_submodule(linear)), runs_counted(layers_of(model)) as counts:
        found = divergence(model, [linear])
        assert found == pytest.approx(divergence(model), rel=1e-4)
    assert counts[0] - len(batches) == (0 if first_run else len(batches))  # beside the whole pass


def test_layers_are_back_after_an_error() -> None:
    model, task = model_and_task("llama")
    divergence, layers = Divergence(task, model, batches_of(model)), list(layers_of(model))
    head = model.get_submodule("lm_head")
    model.set_submodule("lm_head", nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        divergence(model, ["lm_head"])
    model.set_submodule("lm_head", head)
    assert list(layers_of(model)) == layers
    assert divergence(model) == pytest.approx(0, abs=1e-6)
