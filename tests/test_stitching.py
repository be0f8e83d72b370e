"""Stitched features against the resized model, in any order of plans, with and without the prefix cache."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import random_level, tiny_inputs, tiny_model
from ziplm_deploy.architectures import prunable_modules
from ziplm_deploy.pruning.database import Database
from ziplm_deploy.pruning.search import SearchSpace
from ziplm_deploy.pruning.stitching import PlanLoss, StitchedModel
from ziplm_deploy.resizing import first_structures, resize
from ziplm_deploy.tasks import Task, get_task

SIZES = {"attention": (4, 2, 1, 0), "ffn": (64, 24, 8, 0)}


def make(model_type: str) -> tuple[nn.Module, Task, Database, SearchSpace]:
    dense = tiny_model(model_type)
    task = get_task("image-classification" if model_type == "vit" else "sentence-similarity")
    modules = prunable_modules(dense)
    levels_of = {m.name: {size: random_level(dense, m, size) for size in SIZES[m.kind][1:]} for m in modules}
    for module in modules:  # the largest level is the dense module, as in a real database
        levels_of[module.name][module.structures] = first_structures(dense, module, module.structures)
    database = Database(levels_of)
    names = tuple(m.name for m in modules)
    levels = tuple(SIZES[m.kind] for m in modules)
    costs = tuple(np.linspace(1.0, 0.1, 4) for _ in modules)
    return dense, task, database, SearchSpace(names, levels, costs, tuple(np.linspace(0, 1, 4) for _ in modules))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "vit"])
@pytest.mark.parametrize("cache_bytes", [0, 2**24])
def test_features_equal_those_of_the_resized_model(model_type: str, cache_bytes: int) -> None:
    dense, task, database, space = make(model_type)
    stitched = StitchedModel(dense, task, database, space, cache_bytes)
    batches = [tiny_inputs(dense, seed=seed) for seed in range(2)]
    generator = random.Random(0)
    for _ in range(12):
        plan = tuple(generator.randrange(4) for _ in space.modules)
        sizes = space.as_sizes(plan)
        resized = resize(dense, {name: database.modules[name][size] for name, size in sizes.items()})
        for index, batch in enumerate(batches):
            with torch.inference_mode():
                expected = task.features(task.forward(resized, batch), batch)
            torch.testing.assert_close(stitched.features(plan, batch, index), expected, atol=1e-5, rtol=1e-4)


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


def test_two_losses_share_one_model_without_mixing_their_batches() -> None:
    dense, task, database, space = make("bert")
    one, two = [tiny_inputs(dense, seed=1)], [tiny_inputs(dense, seed=2)]
    plan = (1, 2) * (len(space.modules) // 2)
    shared = StitchedModel(dense, task, database, space, 2**20)
    both = PlanLoss(shared, one)(plan), PlanLoss(shared, two, first_index=1)(plan)
    apart = [PlanLoss(StitchedModel(dense, task, database, space, 0), batches)(plan) for batches in (one, two)]
    assert both == pytest.approx(apart, rel=1e-5)
