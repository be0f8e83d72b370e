"""All methods on causal language models: cached heads leave with their queries, plans fit, built models answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.models import output_tensors, tiny_causal_model, tiny_inputs
from tests.helpers.reports import latency_table, timing
from ziplm_deploy.latency.table import Cell, LatencyTable
from ziplm_deploy.models.causal import without_cache
from ziplm_deploy.models.modules import model_shape, output_linear, prunable_modules
from ziplm_deploy.models.resizing import kept_structures, masked
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.methods import METHODS
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import MethodName, PruneConfig, SearchConfig
from ziplm_deploy.tasks import get_task

WIDTHS = (64, 48, 32, 16, 8, 0)


def table_of(model: nn.Module) -> LatencyTable:
    """Base 1 ms; an attention block takes 1 ms whole, a feed-forward one 2 ms."""
    shape = model_shape(model.config)  # type: ignore[arg-type]
    cells = [
        Cell(kind="attention", size=n, timing=timing(0.05 + 0.95 * n / shape.n_heads)) for n in range(shape.n_heads + 1)
    ]
    cells += [Cell(kind="ffn", size=width, timing=timing(0.05 + 1.95 * width / 64)) for width in WIDTHS]
    return latency_table(shape=shape, cells=cells, base=timing(1.0), dense=timing(10.0))


def planner_of(model: nn.Module, method: MethodName) -> Planner:
    batches = [tiny_inputs(model, 6, 12, seed) for seed in range(5)]
    stats = collect_statistics(model, batches, prunable_modules(model), memory_limit_bytes=2**30)
    search = SearchConfig(sensitivity_levels=1, coefficient_steps=2, swap_evaluations=3)
    prune = PruneConfig(method=method, search=search)
    database = build_database(model, stats, database_sizes(model, table_of(model)), prune)
    calibration = Calibration(batches, batches[:1], batches[1:2])
    return Planner(model, get_task("text-generation"), table_of(model), database, calibration, prune, seed=0)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [("llama", method) for method in METHODS]
    + [(model_type, method) for model_type in ("qwen3", "gpt2") for method in ("slimgpt", "wanda-sp", "finer-cut")],
)
def test_plans_fit_and_members_answer(model_type: str, method: MethodName) -> None:
    model = without_cache(tiny_causal_model(model_type))
    planner = planner_of(model, method)
    plan = planner.plan(1.6)
    assert plan.predicted_speedup >= 1.6
    built, unsolved = planner.build(plan)
    assert unsolved == []
    kept = kept_structures(built)
    assert {name: len(structures) for name, structures in kept.items()} == plan.sizes
    assert set(plan.sizes.values()) != {0}
    logits = output_tensors(built, tiny_inputs(model))["logits"]
    assert bool(torch.isfinite(logits).all())
    for module in prunable_modules(built):
        if module.structures:
            columns = output_linear(built, module).in_features
            assert columns == module.structures * module.group_size


@pytest.mark.parametrize("method", ["magnitude", "flap", "wanda-sp", "uniform"])
def test_a_built_member_is_the_masked_model(method: MethodName) -> None:
    """For the levels of the database; those of methods that decide in order are compared in test_in_order."""
    model = without_cache(tiny_causal_model("llama"))
    planner = planner_of(model, method)
    plan = planner.plan(1.6)
    entries = {name: planner.database.modules[name][size] for name, size in plan.sizes.items()}
    inputs = tiny_inputs(model)
    found = output_tensors(planner.resized(plan.sizes), inputs)["logits"]
    expected = output_tensors(masked(model, entries), inputs)["logits"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "flap", "wanda-sp"])
def test_the_score_of_a_cached_head_is_that_of_all_its_columns(method: MethodName) -> None:
    model = without_cache(tiny_causal_model("llama"))
    planner = planner_of(model, method)
    batches = planner.calibration.hessian
    modules = prunable_modules(model)
    stats = collect_statistics(model, batches, modules, memory_limit_bytes=2**30)
    for module in modules[::2]:
        assert (module.structures, module.group_size) == (2, 16)
        W, moments = output_linear(model, module).weight.detach().double(), stats[module.name]
        variance = moments.hessian.diagonal() - moments.mean.square()
        columns = {
            "magnitude": W.square().sum(0),
            "flap": variance * W.square().sum(0),
            "wanda-sp": W.abs().mean(0) * moments.hessian.diagonal().sqrt(),
        }[method]
        better = int(columns.reshape(2, 16).sum(1).argmax())
        assert planner.database.modules[module.name][1].kept.tolist() == [better]
