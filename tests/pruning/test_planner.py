"""Plans of a model that was shrunk before: never larger, within the dense model's budget, down to the built model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.models import output_tensors, random_entries, tiny_inputs, tiny_model
from tests.helpers.reports import latency_table, timing
from ziplm_deploy.errors import IncompatibleArtifactError, TargetUnreachableError
from ziplm_deploy.latency.table import Cell, LatencyTable
from ziplm_deploy.models.modules import model_shape, prunable_modules
from ziplm_deploy.models.resizing import kept_structures, resize
from ziplm_deploy.models.shape import ModuleKind
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.methods import METHODS
from ziplm_deploy.pruning.planner import Calibration, Planner, check_target, database_sizes, table_sizes
from ziplm_deploy.recipe import MethodName, PruneConfig, SearchConfig
from ziplm_deploy.tasks import get_task

WIDTHS = {64: 2.0, 48: 1.5, 40: 1.6, 32: 1.0, 16: 0.5, 8: 0.25, 0: 0.05}  # 40 is slower than 48: not useful
SHRUNK = {"0.attention": 3, "0.ffn": 40, "1.attention": 0, "1.ffn": 16, "2.attention": 4, "2.ffn": 0}


def table() -> LatencyTable:
    """A table of the tiny models: dense 10 ms = base 1 + 3 x (1 + 2); everything dropped: 1.3 ms; SHRUNK: 4.95 ms."""
    cells = [Cell(kind="attention", size=n, timing=timing(0.25 * n or 0.05)) for n in range(5)]
    cells += [Cell(kind="ffn", size=width, timing=timing(ms)) for width, ms in WIDTHS.items()]
    shape = model_shape(tiny_model("bert").config)  # type: ignore[arg-type]
    return latency_table(shape=shape, cells=cells, base=timing(1.0), dense=timing(10.0))


def shrunk_model(model_type: str = "bert") -> nn.Module:
    dense = tiny_model(model_type)
    return resize(dense, random_entries(dense, {name: size for name, size in SHRUNK.items() if size != 4}))


def make_planner(
    model: nn.Module, method: MethodName = "ziplm", measured: LatencyTable | None = None, **settings: Any
) -> Planner:
    task = get_task("image-classification" if model.config.model_type == "vit" else "sentence-similarity")  # type: ignore[union-attr]
    batches = [tiny_inputs(model, 8, 9, seed) for seed in range(6)]
    stats = collect_statistics(model, batches, prunable_modules(model), memory_limit_bytes=2**30)
    search = SearchConfig(sensitivity_levels=2, coefficient_steps=4, swap_evaluations=8)
    prune = PruneConfig(method=method, search=search, **settings)
    measured = measured or table()
    database = build_database(model, stats, database_sizes(model, measured), prune)
    return Planner(model, task, measured, database, Calibration(batches, batches[:2], batches[2:4]), prune, seed=0)


def test_sizes_start_at_what_a_module_has_now() -> None:
    dense = tiny_model("bert")
    useful = table_sizes(table())
    assert useful == {"attention": [4, 3, 2, 1, 0], "ffn": [64, 48, 32, 16, 8, 0]}
    assert database_sizes(dense, table()) == {m.name: useful[m.kind] for m in prunable_modules(dense)}
    assert database_sizes(shrunk_model(), table()) == {
        "0.attention": [3, 2, 1, 0],
        "0.ffn": [40, 32, 16, 8, 0],
        "1.attention": [0],
        "1.ffn": [16, 8, 0],
        "2.attention": [4, 3, 2, 1, 0],
        "2.ffn": [0],
    }


def test_a_table_without_a_size_of_the_model_is_refused() -> None:
    dense = tiny_model("bert")
    model = resize(dense, random_entries(dense, {"1.ffn": 33}))
    with pytest.raises(IncompatibleArtifactError, match=r"1\.ffn at 33"):
        database_sizes(model, table())


@pytest.mark.parametrize("method", METHODS)
def test_plans_of_a_shrunk_model_shrink_it_to_the_dense_models_budget(method: MethodName) -> None:
    model = shrunk_model()
    inputs = tiny_inputs(model)
    before = output_tensors(model, inputs)["last_hidden_state"]
    planner = make_planner(model, method)
    plan = planner.plan(2.6)
    assert plan.budget_ms == pytest.approx(10 / 2.6 - 1)
    assert plan.predicted_ms == pytest.approx(table().predict_ms(plan.sizes))
    assert plan.predicted_speedup == pytest.approx(10 / plan.predicted_ms)
    assert plan.predicted_speedup >= 2.6
    assert all(plan.sizes[name] <= size for name, size in SHRUNK.items())
    if method == "layer-drop":
        assert plan.sizes == {name: size if name[0] == "0" else 0 for name, size in SHRUNK.items()}
    built, _ = planner.build(plan)
    kept = kept_structures(built)
    assert {name: len(indices) for name, indices in kept.items()} == plan.sizes
    assert all(set(kept[name]) <= set(indices) for name, indices in kept_structures(model).items())
    assert bool(torch.isfinite(output_tensors(built, inputs)["last_hidden_state"]).all())
    assert torch.equal(before, output_tensors(model, inputs)["last_hidden_state"])


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_is_reached_already_keeps_the_model(method: MethodName) -> None:
    planner = make_planner(shrunk_model(), method)
    plan = planner.plan(1.5)
    assert plan.sizes == SHRUNK
    assert plan.predicted_speedup == pytest.approx(10 / 4.95)
    assert not planner.changes(plan, 1.5)  # there is budget left, but nothing can grow
    assert planner.changes(plan, 2.6)


def compressed_table() -> LatencyTable:
    """A table of these models as INT8: whole they take 10 ms, the dense float model on its own engine takes 30 ms."""
    changes = {"dense": timing(30.0), "unpruned": timing(10.1), "variant": "int8", "baseline_engine": "openvino"}
    return table().model_copy(update=changes)


@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_model_that_is_fast_enough_keeps_everything(method: MethodName) -> None:
    dense = tiny_model("bert")
    planner = make_planner(dense, method, compressed_table())
    plan = planner.plan(2.0)
    assert plan.sizes == {module.name: module.structures for module in prunable_modules(dense)}
    assert plan.budget_ms == pytest.approx(30 / 2 - 1)
    assert plan.predicted_ms == pytest.approx(10.0)
    assert plan.predicted_speedup == pytest.approx(3.0)  # more than asked for, and said so
    assert (plan.search_loss, plan.seed_losses, plan.evaluations) == (None, {}, 0)
    assert not planner.changes(plan, 1.2)  # nothing can be given back
    inputs = tiny_inputs(dense)
    found, expected = (output_tensors(model, inputs) for model in (planner.build(plan)[0], dense))
    assert torch.equal(found["last_hidden_state"], expected["last_hidden_state"])


@pytest.mark.parametrize("method", METHODS)
def test_beyond_that_it_is_pruned_to_the_dense_models_budget(method: MethodName) -> None:
    planner = make_planner(tiny_model("bert"), method, compressed_table())
    plan = planner.plan(6.0)
    assert plan.budget_ms == pytest.approx(30 / 6 - 1)
    assert sum(compressed_table().latency_ms(_kind(name), size) for name, size in plan.sizes.items()) <= plan.budget_ms
    assert plan.predicted_speedup == pytest.approx(30 / plan.predicted_ms)
    assert plan.predicted_speedup >= 6.0


def _kind(name: str) -> ModuleKind:
    return "attention" if name.endswith("attention") else "ffn"


def test_the_largest_speedup_of_a_compressed_model_is_over_the_dense_float_model() -> None:
    measured = compressed_table()
    check_target(measured, 30 / 1.3 - 0.01)
    with pytest.raises(TargetUnreachableError, match=r"reaches 23\.08x as int8 in onnxruntime") as caught:
        check_target(measured, 24.0)
    assert caught.value.largest_speedup == pytest.approx(30 / 1.3)
    assert measured.largest_speedup() == pytest.approx(30 / 1.3)


def test_a_warm_start_from_larger_and_from_smaller_plans() -> None:
    planner = make_planner(shrunk_model())
    larger = {m.name: m.structures for m in prunable_modules(tiny_model("bert"))}
    assert "previous" not in planner.plan(2.6, warm=larger).seed_losses  # becomes the model as it is: too slow
    smaller = {"0.attention": 2, "0.ffn": 16, "1.attention": 0, "1.ffn": 8, "2.attention": 2, "2.ffn": 0}
    plan = planner.plan(2.6, warm=smaller)
    assert plan.search_loss is not None
    assert plan.search_loss <= plan.seed_losses["previous"]
    assert plan.evaluations < planner.plan(2.6).evaluations / 1.5  # most of the few plans here are seeds


def test_a_draft_takes_its_budget_without_a_search() -> None:
    planner = make_planner(tiny_model("bert"))
    plan = planner.draft(2.0, 2.2)
    assert (plan.speedup_target, plan.evaluations, plan.search_loss) == (2.0, 0, None)
    assert plan.predicted_speedup >= 2.2
    assert not planner.changes(plan, plan.predicted_speedup)  # what is left of the budget lets nothing grow
    sizes = {m.name: m.structures for m in prunable_modules(planner.resized(plan.sizes))}
    assert sizes == plan.sizes
    assert planner.draft(1.0, 0.9).sizes == {m.name: m.structures for m in prunable_modules(planner.model)}
    with pytest.raises(TargetUnreachableError, match=r"7\.69x"):
        planner.draft(8.0, 8.0)


def test_an_unreachable_target_names_the_speedup_over_the_dense_model() -> None:
    planner = make_planner(shrunk_model())
    assert planner.budget_ms(7.6) == pytest.approx(10 / 7.6 - 1)
    with pytest.raises(TargetUnreachableError, match=r"7\.69x") as caught:
        planner.plan(8.0)
    assert caught.value.largest_speedup == pytest.approx(10 / 1.3)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "deberta-v2", "t5", "vit"])
def test_targets_one_after_the_other_from_the_model_before(model_type: str) -> None:
    model = tiny_model(model_type)
    for target in (1.5, 2.5, 5.0):
        sizes = {m.name: m.structures for m in prunable_modules(model)}
        kept = kept_structures(model)
        planner = make_planner(model)
        plan = planner.plan(target)
        assert plan.predicted_speedup >= target
        assert all(plan.sizes[name] <= size for name, size in sizes.items())
        model, _ = planner.build(plan)
        assert all(set(indices) <= set(kept[name]) for name, indices in kept_structures(model).items())


@pytest.mark.parametrize("method", ["ziplm", "flap", "finer-cut"])
def test_plans_are_built_in_order_if_the_recipe_says_so(method: MethodName) -> None:
    at_once, in_order = (make_planner(tiny_model("bert"), method, in_order=value) for value in (False, True))
    plan = at_once.plan(2.0)
    assert in_order.plan(2.0).sizes == plan.sizes  # only what is kept, and its weights, are decided anew
    one, other = at_once.build(plan)[0], in_order.build(plan)[0]
    assert {name: len(kept) for name, kept in kept_structures(other).items()} == plan.sizes
    assert (at_once.exchanged_fraction(plan, one), plan.exchanged_fraction) == (None, None)
    exchanged = in_order.exchanged_fraction(plan, other)
    assert exchanged is not None
    assert (exchanged > 0) == (kept_structures(one) != kept_structures(other)) == (method != "finer-cut")
    inputs = tiny_inputs(at_once.model)
    found, expected = (output_tensors(model, inputs)["last_hidden_state"] for model in (other, one))
    assert torch.allclose(found, expected) == (method == "finer-cut")


def test_a_plan_that_keeps_everything_needs_no_order() -> None:
    planner = make_planner(tiny_model("bert"), "slimgpt", compressed_table())
    plan = planner.plan(2.0)
    built, unsolved = planner.build(plan)
    assert (unsolved, planner.exchanged_fraction(plan, built)) == ([], 0.0)


def test_blocks_are_dropped_by_the_damage_that_they_do() -> None:
    planner = make_planner(tiny_model("bert"), "finer-cut")
    plan = planner.plan(1.3)
    full = {m.name: m.structures for m in prunable_modules(planner.model)}
    dropped = [name for name, size in plan.sizes.items() if size == 0]
    assert all(plan.sizes[name] in (0, full[name]) for name in full)
    assert plan.evaluations == sum(range(6, 6 - len(dropped), -1))
    loss = planner.losses()[0]
    alone = {name: loss(planner.space.from_sizes(full | {name: 0})) for name in full}
    assert min(alone, key=alone.__getitem__) in dropped
