"""Sparse encoders: counts, least squares, order of layers, densities, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.models import (
    LINEARS_A_LAYER,
    MODEL_TYPES,
    last_states,
    random_entries,
    tiny_batches,
    tiny_inputs,
    tiny_model,
)
from ziplm_deploy.compression.sparsity import sparsegpt
from ziplm_deploy.compression.sparsity.densities import allocate_densities
from ziplm_deploy.compression.sparsity.masks import random_masks, sparsity_of, zero_masks
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.compression.sparsity.sparsify import sparsify_model, sparsity_bytes
from ziplm_deploy.errors import DataError, NumericalError, UnsupportedModelError, UsageError
from ziplm_deploy.models.modules import layer_linears, layers_of
from ziplm_deploy.models.resizing import random_resized, resize
from ziplm_deploy.recipe import SparsityConfig
from ziplm_deploy.tasks.batching import Batch

PLENTY = 2**30
SIZES = {"0.attention": 2, "0.ffn": 24, "1.attention": 0, "1.ffn": 13, "2.ffn": 0}
QUERY = "encoder.layer.0.attention.self.query"


def sparsify(model: nn.Module, data: list[Batch] | None = None, **fields: object) -> SparsityRecord:
    config = SparsityConfig.model_validate(fields)
    return sparsify_model(model, tiny_batches(model) if data is None else data, config, memory_limit_bytes=PLENTY)


def inputs_and_outputs(model: nn.Module, linear: nn.Linear, data: list[Batch]) -> tuple[Tensor, Tensor]:
    """What a linear gets and gives at real tokens, float64 [N, d] and [N, r]."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = linear.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    rows = [
        tuple(t[b["attention_mask"] == 1] if "attention_mask" in b else t.flatten(0, 1) for t in pair)
        for pair, b in zip(seen, data, strict=True)
    ]
    return torch.cat([x for x, _ in rows]).double(), torch.cat([y for _, y in rows]).double()


def divergence_from(dense: nn.Module, data: list[Batch]) -> Callable[..., float]:
    wanted = last_states(dense, data)

    def divergence(model: nn.Module, changed: Sequence[str] = ()) -> float:
        return float((last_states(model, data) - wanted).square().mean())

    return divergence


# --- which linears ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_linears_of_the_layers_and_nothing_else(model_type: str) -> None:
    model = tiny_model(model_type)
    linears = layer_linears(model)
    assert len(linears) == 3 * LINEARS_A_LAYER.get(model_type, 6)
    inside = {id(linear) for layer in layers_of(model) for linear in layer.modules()}
    assert all(model.get_submodule(name) is linear and id(linear) in inside for name, linear in linears.items())
    assert sum(linear.weight.numel() for linear in linears.values()) == 3 * (
        4 * 32 * 32 + (3 if model_type in LINEARS_A_LAYER else 2) * 32 * 64
    )


def test_heads_poolers_and_dropped_modules_are_left_out() -> None:
    model = random_resized(tiny_model("bert", "text-classification"), SIZES)
    names = list(layer_linears(model))
    assert all(name.startswith("bert.encoder.layer.") for name in names)
    assert [sum(f"layer.{layer}." in name for name in names) for layer in range(3)] == [6, 2, 4]


# --- the model as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "deberta-v2", "t5", "vit"])
def test_zeros_are_exact_and_better_than_magnitude(model_type: str, pattern: str) -> None:
    dense = tiny_model(model_type)
    model = copy.deepcopy(dense).train()
    record = sparsify(model, sparsity=0.5, pattern=pattern)
    assert model.training
    assert record.sparsity == sparsity_of(model) == 0.5
    assert [(row.name, row.shape) for row in record.linears] == [
        (name, tuple(linear.weight.shape)) for name, linear in layer_linears(dense).items()
    ]
    assert all(row.density == 0.5 and 0 < row.relative_error < 1 and row.damping > 0 for row in record.linears)
    model.eval()
    masked = copy.deepcopy(dense)
    for linear in layer_linears(masked).values():
        scores = linear.weight.detach().abs()
        if pattern == "block4":
            groups = scores.reshape(len(scores), -1, 4)
            scores = groups.sum(2, keepdim=True).expand_as(groups).reshape(scores.shape)
        with torch.no_grad():
            linear.weight.masked_fill_(scores <= scores.flatten().kthvalue(scores.numel() // 2).values, 0)
    if pattern == "block4":
        for mask in zero_masks(model).values():
            assert all(torch.equal(group.any(1), group.all(1)) for group in mask.split(4, dim=1))
    new = [tiny_inputs(dense, batch_size=8, seed=100 + seed) for seed in range(4)]
    divergence = divergence_from(dense, new)
    assert divergence(model) < 0.7 * divergence(masked)


def test_a_resized_model_keeps_its_shapes_and_gets_its_zeros() -> None:
    dense = tiny_model("bert", "text-classification")
    model = resize(dense, random_entries(dense, SIZES))
    record = sparsify(model, sparsity=0.75)
    total = sum(linear.weight.numel() for linear in layer_linears(model).values())
    assert record.sparsity == pytest.approx(0.75, abs=6 / total)
    assert len(record.linears) == 12
    assert {row.shape for row in record.linears if ".1.output" in row.name} == {(32, 13)}


def test_one_linear_is_a_least_squares_fit_of_weights_and_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "REFIT_TOLERANCE", 0.0)
    monkeypatch.setattr(sparsegpt.sparsify, "__kwdefaults__", {**sparsegpt.sparsify.__kwdefaults__, "refit_steps": 300})
    dense = tiny_model("bert")
    model, data = copy.deepcopy(dense), tiny_batches(dense, 20)
    record = sparsify(model, data, sparsity=0.5, damping=1e-6)
    before, after = (layer_linears(m)[QUERY] for m in (dense, model))
    x, y = inputs_and_outputs(dense, before, data)
    found = x @ after.weight.detach().double().T + after.bias.detach().double()
    for row in range(0, 32, 5):
        kept = after.weight[row] != 0
        design = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], 1)
        fitted = design @ torch.linalg.lstsq(design, y[:, row : row + 1]).solution
        best = (fitted[:, 0] - y[:, row]).square().mean()
        assert float((found[:, row] - y[:, row]).square().mean()) == pytest.approx(float(best), rel=1e-3)
    relative = float((found - y).square().sum() / y.square().sum())
    assert next(row for row in record.linears if row.name == QUERY).relative_error == pytest.approx(relative, rel=1e-3)


def test_a_linear_without_bias_is_fitted_to_plain_moments() -> None:
    dense = tiny_model("vit", qkv_bias=False)
    model, data = copy.deepcopy(dense), tiny_batches(dense)
    record = sparsify(model, data, sparsity=0.5)
    name = next(name for name, linear in layer_linears(dense).items() if linear.bias is None)
    x, y = inputs_and_outputs(dense, layer_linears(dense)[name], data)
    found = x @ layer_linears(model)[name].weight.detach().double().T
    relative = float((found - y).square().sum() / y.square().sum())
    assert next(row for row in record.linears if row.name == name).relative_error == pytest.approx(relative, rel=1e-3)


def test_later_linears_see_the_sparse_ones_before_them() -> None:
    """The recorded error of the last linear holds on the inputs that it gets in the finished model."""
    dense = tiny_model("bert")
    model, data = copy.deepcopy(dense), tiny_batches(dense)
    record = sparsify(model, data, sparsity=0.6)
    for name in ("encoder.layer.1.attention.self.value", "encoder.layer.2.output.dense"):
        before, after = (layer_linears(m)[name] for m in (dense, model))
        x, found = inputs_and_outputs(model, after, data)
        wanted = x @ before.weight.detach().double().T + before.bias.detach().double()
        relative = float((found - wanted).square().sum() / wanted.square().sum())
        row = next(row for row in record.linears if row.name == name)
        assert row.relative_error == pytest.approx(relative, rel=1e-3)


def test_padding_does_not_count() -> None:
    model = tiny_model("bert")
    data = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in tiny_batches(model, 4)]
    padded = [
        {name: torch.cat([t, torch.zeros(8, 5, dtype=torch.int64)], 1) for name, t in batch.items()} for batch in data
    ]
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    records = sparsify(one, data, sparsity=0.5), sparsify(other, padded, sparsity=0.5)
    assert records[0].n_tokens == records[1].n_tokens == 4 * 8 * 9
    torch.testing.assert_close(last_states(one, data), last_states(other, data), rtol=1e-2, atol=1e-2)


def test_passes_keep_zeros_and_end_at_the_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.compression.sparsity import sparsify as module

    history: list[tuple[str, Tensor]] = []
    fit = module._fit

    def watched(goal: Any, *rest: Any) -> Any:
        result = fit(goal, *rest)
        history.append((goal.name, goal.linear.weight == 0))
        return result

    monkeypatch.setattr(module, "_fit", watched)
    model = tiny_model("bert")
    steps: list[tuple[int, int]] = []
    config = SparsityConfig(sparsity=0.75, passes=2)
    record = sparsify_model(
        model, iter(tiny_batches(model)), config, memory_limit_bytes=PLENTY, progress=lambda *step: steps.append(step)
    )
    assert record.sparsity == 0.75
    assert steps == [(done, 2 * 12) for done in range(1, 25)]  # q, k and v are one input
    for name in layer_linears(model):
        first, second = (zeros for other, zeros in history if other == name)
        assert int(first.sum()) == first.numel() // 2  # half the weights in each of two passes
        assert bool((second | ~first).all())


def test_several_passes_do_not_lose_to_one_by_much() -> None:
    dense = tiny_model("bert")
    divergence = divergence_from(dense, tiny_batches(dense))
    found = []
    for passes in (1, 4):
        model = copy.deepcopy(dense)
        sparsify(model, sparsity=0.7, passes=passes)
        found.append(divergence(model))
    assert found[1] < 1.1 * found[0]


def test_a_sparse_model_can_become_sparser() -> None:
    model = tiny_model("bert")
    sparsify(model, sparsity=0.4)
    before = zero_masks(model)
    sparsify(model, sparsity=0.7)
    assert sparsity_of(model) == pytest.approx(0.7, abs=1e-3)
    for name, zeros in zero_masks(model).items():
        assert bool((zeros | ~before[name]).all())


def test_inputs_that_never_vary_lose_their_weights_first_and_cost_nothing() -> None:
    dense = tiny_model("bert")
    with torch.no_grad():  # a constant FFN input column: the LayerNorm before it gives 0 + its bias
        dense.get_submodule("encoder.layer.0.attention.output.LayerNorm").weight[:6] = 0
    model = copy.deepcopy(dense)
    sparsify(model, sparsity=0.3)
    assert not layer_linears(model)["encoder.layer.0.intermediate.dense"].weight[:, :6].any()
    assert bool(torch.isfinite(last_states(model, tiny_batches(model))).all())


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    record = sparsify(tiny_model("bert"), sparsity=0.5, pattern="block4")
    record.save(tmp_path / "sparsity.json")
    assert SparsityRecord.load(tmp_path / "sparsity.json") == record


# --- sensitivity -----------------------------------------------------------------------------------------------------


def test_sensitive_linears_stay_denser_at_the_same_number_of_zeros() -> None:
    dense = tiny_model("bert")
    model, data = copy.deepcopy(dense), tiny_batches(dense)
    divergence = divergence_from(dense, data)
    config = SparsityConfig(sparsity=0.6, distribution="sensitivity")
    steps: list[tuple[int, int]] = []
    record = sparsify_model(
        model,
        data,
        config,
        memory_limit_bytes=PLENTY,
        divergence=divergence,
        progress=lambda *step: steps.append(step),
    )
    assert steps[-1] == (24, 24)
    total = sum(row.shape[0] * row.shape[1] for row in record.linears)
    assert record.sparsity == pytest.approx(0.6, abs=18 / total)
    square = sorted((row for row in record.linears if row.shape == (32, 32)), key=lambda row: row.sensitivity or 0)
    densities = [row.density for row in square]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]
    # what was measured is the model with that linear alone sparse: here the last one, whose inputs stay dense
    alone, last = copy.deepcopy(dense), "encoder.layer.2.output.dense"
    sparsify(alone, data, sparsity=0.6)
    for name, linear in layer_linears(alone).items():
        if name != QUERY:
            linear.load_state_dict(layer_linears(dense)[name].state_dict())
    measured = {row.name: row.sensitivity for row in record.linears}
    assert measured[QUERY] == pytest.approx(divergence(alone), rel=1e-3)
    assert measured[last] is not None


def test_measuring_leaves_the_weights_as_they_were() -> None:
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())

    def stop_at_the_last(candidate: nn.Module, linears: Sequence[str]) -> float:
        changed = [name for name, value in candidate.state_dict().items() if not torch.equal(value, before[name])]
        assert changed
        assert {name.rpartition(".")[0] for name in changed} == set(linears)
        return float("nan") if changed[0].startswith("encoder.layer.2.output") else 1.0

    config = SparsityConfig(distribution="sensitivity")
    with pytest.raises(NumericalError, match=r"encoder\.layer\.2\.output\.dense"):
        sparsify_model(model, tiny_batches(model, 3), config, memory_limit_bytes=PLENTY, divergence=stop_at_the_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sensitivity_needs_a_divergence() -> None:
    with pytest.raises(ValueError, match="divergence"):
        sparsify(tiny_model("bert"), distribution="sensitivity")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000)), min_size=1, max_size=12),
    st.floats(0.02, 0.98),
)
@example([(5e-324, 2)], 0.5)  # too small to be divided
def test_densities_are_bounded_monotone_and_add_up(rows: list[tuple[float, int]], density: float) -> None:
    sensitivities = {str(index): s for index, (s, _) in enumerate(rows)}
    sizes = {str(index): n for index, (_, n) in enumerate(rows)}
    found = allocate_densities(sensitivities, sizes, density)
    total = sum(found[name] * sizes[name] for name in sizes)
    assert total == pytest.approx(density * sum(sizes.values()), rel=1e-6)
    for name, value in found.items():
        assert 0.5 * density - 1e-9 <= value <= min(1, 2 * density) + 1e-9
        for other in found:
            if sizes[name] == sizes[other] and sensitivities[name] >= sensitivities[other]:
                assert value >= found[other]


def test_what_is_zero_stays_zero_and_the_others_make_up_for_it() -> None:
    sizes, sensitivities = dict.fromkeys("abc", 100), {"a": 8.0, "b": 1.0, "c": 1.0}
    assert allocate_densities(sensitivities, sizes, 0.2)["a"] > 0.25
    found = allocate_densities(sensitivities, sizes, 0.2, {"a": 0.25, "b": 0.5, "c": 0.5})
    assert found == pytest.approx({"a": 0.25, "b": 0.175, "c": 0.175})
    nothing_left = allocate_densities(sensitivities, sizes, 0.2, {"a": 0.05, "b": 0.5, "c": 0.5})
    assert nothing_left == pytest.approx({"a": 0.05, "b": 0.275, "c": 0.275})


def test_equal_sensitivity_per_weight_is_uniform() -> None:
    sizes = {"a": 10, "b": 20}
    assert allocate_densities({"a": 0.0, "b": -1e-9}, sizes, 0.2) == {"a": 0.2, "b": 0.2}
    assert allocate_densities({"a": 1.0, "b": 2.0}, sizes, 0.2) == pytest.approx({"a": 0.2, "b": 0.2})


# --- bad input -------------------------------------------------------------------------------------------------------


def test_no_tokens_name_the_linear() -> None:
    model = tiny_model("bert")
    with pytest.raises(DataError, match="query"):
        sparsify(model, [])
    batch = tiny_inputs(model)
    with pytest.raises(DataError, match="query"):
        sparsify(model, [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])


def test_a_linear_that_is_never_called_is_named() -> None:
    model = tiny_model("bert")
    model.get_submodule("encoder.layer.1.attention.self").register_module("spare", nn.Linear(32, 32))
    with pytest.raises(DataError, match=r"encoder\.layer\.1\.attention\.self\.spare"):
        sparsify(model)


def test_broken_activations_and_weights_name_the_linear() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        layer_linears(model)["encoder.layer.0.attention.output.dense"].bias[0] = float("nan")
    with pytest.raises(NumericalError, match=r"encoder\.layer\.0\.intermediate\.dense"):
        sparsify(model)
    model = tiny_model("bert")
    with torch.no_grad():
        layer_linears(model)[QUERY].weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="query"):
        sparsify(model)
    assert not layer_linears(model)[QUERY]._forward_pre_hooks


def test_a_model_without_linears_is_refused_for_fitting_only() -> None:
    dense = tiny_model("bert")
    model = random_resized(dense, {f"{layer}.{kind}": 0 for layer in range(3) for kind in ("attention", "ffn")})
    with pytest.raises(UnsupportedModelError, match="dropped"):
        sparsify(model)
    random_masks(model, SparsityConfig(), 0)
    assert zero_masks(model) == {}
    assert sparsity_of(model) == 0


def test_the_memory_limit_names_linear_and_field() -> None:
    model = tiny_model("bert")
    limit = sparsity_bytes(32, 64)
    with pytest.raises(UsageError, match=r"layer\.0\.output\.dense within prune\.memory_limit_gb"):
        sparsify_model(model, tiny_batches(model), SparsityConfig(), memory_limit_bytes=limit)
    sparsify_model(model, tiny_batches(model), SparsityConfig(), memory_limit_bytes=sparsity_bytes(64, 32))
