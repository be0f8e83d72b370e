"""Stitched features against the resized model, in any order of plans, with and without the prefix cache."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.models import random_entries, random_level, tiny_causal_model, tiny_inputs, tiny_model
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.models.resizing import first_structures, resize
from ziplm_deploy.pruning.database import Database
from ziplm_deploy.pruning.search.space import SearchSpace
from ziplm_deploy.pruning.search.stitching import PlanLoss, StitchedModel, _ByteCache
from ziplm_deploy.tasks import Task, get_task

SIZES = {"attention": (4, 2, 1, 0), "ffn": (64, 24, 8, 0)}


SHRUNK = {"0.attention": 3, "0.ffn": 0, "1.attention": 0, "1.ffn": 20, "2.attention": 2}


def make(model_type: str, shrunk: bool = False) -> tuple[nn.Module, Task, Database, SearchSpace]:
    model = tiny_model(model_type)
    if shrunk:
        model = resize(model, random_entries(model, SHRUNK, seed=5))
    return with_levels(model, get_task("image-classification" if model_type == "vit" else "sentence-similarity"))


def with_levels(model: nn.Module, task: Task) -> tuple[nn.Module, Task, Database, SearchSpace]:
    levels: dict[str, dict[int, LevelWeights]] = {}
    for module in prunable_modules(model):
        now = module.structures  # the largest level is the module as it is, as in a real database
        levels[module.name] = {now: first_structures(model, module, now)}
        levels[module.name] |= {size: random_level(model, module, size) for size in SIZES[module.kind] if size < now}
    counts = [len(of_module) for of_module in levels.values()]
    costs, errors = (tuple(np.linspace(*ends, n) for n in counts) for ends in ((1.0, 0.1), (0.0, 1.0)))
    return model, task, Database(levels), SearchSpace(tuple(levels), tuple(map(tuple, levels.values())), costs, errors)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "deberta-v2", "t5", "vit"])
@pytest.mark.parametrize("cache_bytes", [0, 2**24])
@pytest.mark.parametrize("shrunk", [False, True])
def test_features_equal_those_of_the_resized_model(model_type: str, cache_bytes: int, shrunk: bool) -> None:
    dense, task, database, space = make(model_type, shrunk)
    stitched = StitchedModel(dense, task, database, space, cache_bytes, replacement_bytes=cache_bytes)
    batches = [tiny_inputs(dense, seed=seed) for seed in range(2)]
    generator = random.Random(0)
    for _ in range(12):
        plan = tuple(generator.randrange(len(levels)) for levels in space.sizes)
        sizes = space.as_sizes(plan)
        resized = resize(dense, {name: database.modules[name][size] for name, size in sizes.items()})
        for index, batch in enumerate(batches):
            with torch.inference_mode():
                expected = task.features(task.forward(resized, batch), batch)
            torch.testing.assert_close(stitched.features(plan, batch, index), expected, atol=1e-5, rtol=1e-4)


def test_both_caches_stay_within_their_limits() -> None:
    dense, task, database, space = make("bert")
    reference = StitchedModel(dense, task, database, space, 2**30, 2**30)
    limited = StitchedModel(dense, task, database, space, cache_bytes=10_000, replacement_bytes=50_000)
    generator = random.Random(1)
    for _ in range(30):
        plan = tuple(generator.randrange(4) for _ in space.modules)
        batch = tiny_inputs(dense)
        torch.testing.assert_close(limited.features(plan, batch, 0), reference.features(plan, batch, 0))
        assert 0 < limited._replacements.held_bytes <= 50_000
        assert limited._hidden.held_bytes <= 10_000
    assert reference._replacements.held_bytes > 50_000


def test_what_was_unused_for_longest_goes_first() -> None:
    cache: _ByteCache[str] = _ByteCache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)
    assert [key in cache for key in "abc"] == [True, False, True]
    assert (cache.get("b"), cache.held_bytes) == (None, 8)
    cache.put("too large", "D", 11)
    assert cache.held_bytes == 0


def test_the_dense_model_is_not_touched() -> None:
    dense, task, database, space = make("bert")
    batch = tiny_inputs(dense)
    before = dense(**batch).last_hidden_state
    stitched = StitchedModel(dense, task, database, space, 2**20)
    stitched.features((3,) * len(space.modules), batch, 0)
    assert torch.equal(dense(**batch).last_hidden_state, before)


def test_the_loss_stops_early_only_when_it_must_exceed_the_bound() -> None:
    dense, task, database, space = make("bert")
    loss = PlanLoss(StitchedModel(dense, task, database, space, 2**20), [tiny_inputs(dense, seed=s) for s in range(3)])
    plan = (2,) * len(space.modules)
    assert loss(plan, 1e-6) == float("inf")
    full = loss(plan)
    assert 0 < full < float("inf")
    assert loss(plan, full * 1.01) == full
    assert loss((0,) * len(space.modules)) == pytest.approx(0.0, abs=1e-5)


def test_a_plan_that_was_given_up_is_not_tried_again_with_the_same_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, task, database, space = make("bert")
    stitched = StitchedModel(dense, task, database, space, 2**20)
    loss, passes = PlanLoss(stitched, [tiny_inputs(dense, seed=s) for s in range(3)]), []
    inner = stitched.features
    monkeypatch.setattr(stitched, "features", lambda *args: (passes.append(args), inner(*args))[1])
    plan = (2,) * len(space.modules)
    assert loss(plan, 1e-6) == loss(plan, 1e-6) == loss(plan, 1e-7) == float("inf")
    assert len(passes) == 1
    assert loss(plan, 1e9) == loss(plan) < float("inf")
    assert len(passes) == 4


def test_two_losses_share_one_model_without_mixing_their_batches() -> None:
    dense, task, database, space = make("bert")
    one, two = [tiny_inputs(dense, seed=1)], [tiny_inputs(dense, seed=2)]
    plan = (1, 2) * (len(space.modules) // 2)
    shared = StitchedModel(dense, task, database, space, 2**20)
    both = PlanLoss(shared, one)(plan), PlanLoss(shared, two, first_index=1)(plan)
    apart = [PlanLoss(StitchedModel(dense, task, database, space, 0), batches)(plan) for batches in (one, two)]
    assert both == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_of_a_language_model_hidden_states_are_held_and_not_logits(model_type: str) -> None:
    dense, task, database, space = with_levels(tiny_causal_model(model_type), get_task("text-generation"))
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(5, 25, (2, 20), generator=generator), "attention_mask": torch.ones(2, 20).long()}
        for _ in range(2)
    ]
    loss = PlanLoss(StitchedModel(dense, task, database, space, 2**20), batches)
    assert {tuple(held.shape) for held in loss._targets} == {(32, dense.config.hidden_size)}  # 16 positions a text
    plan = tuple(index % 3 for index in range(len(space.modules)))
    resized = resize(dense, {name: database.modules[name][size] for name, size in space.as_sizes(plan).items()})
    with torch.no_grad():
        each = [task.divergence(task.compared(resized, batch), task.compared(dense, batch)) for batch in batches]
    assert loss(plan) == pytest.approx(float(sum(each)) / 2, rel=1e-3)
    assert loss((0,) * len(space.modules)) == pytest.approx(0.0, abs=1e-6)
