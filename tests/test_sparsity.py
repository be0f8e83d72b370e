"""Sparse encoders: counts, least squares, order of layers, densities, held and random zeros, zeros in ONNX files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import MODEL_TYPES, random_entries, tiny_inputs, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import write
from torch import Tensor, nn

from exporters import ExportSettings, dummy_inputs, export_encoder
from ziplm_deploy.calibration import Batch
from ziplm_deploy.compression import sparsegpt
from ziplm_deploy.compression.int8 import quantize
from ziplm_deploy.compression.masks import check_masks_in_onnx, held, random_masks, sparsity_of, zero_masks
from ziplm_deploy.compression.sparsity import (
    SparsityRecord,
    allocate_densities,
    prunable_linears,
    sparsify_model,
    sparsity_bytes,
)
from ziplm_deploy.config import EngineName, Int8Config, SparsityConfig
from ziplm_deploy.errors import (
    CorruptArtifactError,
    DataError,
    NumericalError,
    ParityError,
    UnsupportedModelError,
    UsageError,
)
from ziplm_deploy.resizing import random_resized, resize

PLENTY = 2**30
SIZES = {"0.attention": 2, "0.ffn": 24, "1.attention": 0, "1.ffn": 13, "2.ffn": 0}
QUERY = "encoder.layer.0.attention.self.query"


def batches(model: nn.Module, n: int = 12) -> list[Batch]:
    return [tiny_inputs(model, batch_size=8, seed=seed) for seed in range(n)]


def sparsify(model: nn.Module, data: list[Batch] | None = None, **fields: object) -> SparsityRecord:
    config = SparsityConfig.model_validate(fields)
    return sparsify_model(model, batches(model) if data is None else data, config, memory_limit_bytes=PLENTY)


def states(model: nn.Module, data: list[Batch]) -> Tensor:
    """Last hidden states [N, hidden] of real tokens."""
    rows = []
    with torch.no_grad():
        for batch in data:
            last = model.base_model(**batch).last_hidden_state  # type: ignore[operator, union-attr]
            rows.append(last[batch["attention_mask"] == 1] if "attention_mask" in batch else last.flatten(0, 1))
    return torch.cat(rows)


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


def divergence_from(dense: nn.Module, data: list[Batch]) -> Callable[[nn.Module], float]:
    wanted = states(dense, data)
    return lambda model: float((states(model, data) - wanted).square().mean())


def export(model: nn.Module, path: Path, opset: int = 17) -> Path:
    settings = ExportSettings(seq_len=16, opset=opset)
    output = "logits" if model.config.model_type == "vit" else "last_hidden_state"  # type: ignore[union-attr]
    export_encoder(model, dummy_inputs(model, settings), [output], path, settings)
    return path


# --- which linears ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_six_linears_a_layer_and_nothing_else(model_type: str) -> None:
    model = tiny_model(model_type)
    linears = prunable_linears(model)
    assert len(linears) == 3 * 6
    assert all(model.get_submodule(name) is linear and ".layer." in f".{name}" for name, linear in linears.items())
    assert sum(linear.weight.numel() for linear in linears.values()) == 3 * (4 * 32 * 32 + 2 * 32 * 64)


def test_heads_poolers_and_dropped_modules_are_left_out() -> None:
    model = random_resized(tiny_model("bert", "text-classification"), SIZES)
    names = list(prunable_linears(model))
    assert all(name.startswith("bert.encoder.layer.") for name in names)
    assert [sum(f"layer.{layer}." in name for name in names) for layer in range(3)] == [6, 2, 4]


# --- the model as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "vit"])
def test_zeros_are_exact_and_better_than_magnitude(model_type: str, pattern: str) -> None:
    dense = tiny_model(model_type)
    model = copy.deepcopy(dense).train()
    record = sparsify(model, sparsity=0.5, pattern=pattern)
    assert model.training
    assert record.sparsity == sparsity_of(model) == 0.5
    assert [(row.name, row.shape) for row in record.linears] == [
        (name, tuple(linear.weight.shape)) for name, linear in prunable_linears(dense).items()
    ]
    assert all(row.density == 0.5 and 0 < row.relative_error < 1 and row.damping > 0 for row in record.linears)
    model.eval()
    masked = copy.deepcopy(dense)
    for linear in prunable_linears(masked).values():
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
    total = sum(linear.weight.numel() for linear in prunable_linears(model).values())
    assert record.sparsity == pytest.approx(0.75, abs=6 / total)
    assert len(record.linears) == 12
    assert {row.shape for row in record.linears if ".1.output" in row.name} == {(32, 13)}


def test_one_linear_is_a_least_squares_fit_of_weights_and_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "REFIT_TOLERANCE", 0.0)
    monkeypatch.setattr(sparsegpt.sparsify, "__kwdefaults__", {**sparsegpt.sparsify.__kwdefaults__, "refit_steps": 300})
    dense = tiny_model("bert")
    model, data = copy.deepcopy(dense), batches(dense, 20)
    record = sparsify(model, data, sparsity=0.5, damping=1e-6)
    before, after = (prunable_linears(m)[QUERY] for m in (dense, model))
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
    model, data = copy.deepcopy(dense), batches(dense)
    record = sparsify(model, data, sparsity=0.5)
    name = "vit.encoder.layer.0.attention.attention.query"
    x, y = inputs_and_outputs(dense, prunable_linears(dense)[name], data)
    found = x @ prunable_linears(model)[name].weight.detach().double().T
    relative = float((found - y).square().sum() / y.square().sum())
    assert next(row for row in record.linears if row.name == name).relative_error == pytest.approx(relative, rel=1e-3)


def test_later_linears_see_the_sparse_ones_before_them() -> None:
    """The recorded error of the last linear holds on the inputs that it gets in the finished model."""
    dense = tiny_model("bert")
    model, data = copy.deepcopy(dense), batches(dense)
    record = sparsify(model, data, sparsity=0.6)
    for name in ("encoder.layer.1.attention.self.value", "encoder.layer.2.output.dense"):
        before, after = (prunable_linears(m)[name] for m in (dense, model))
        x, found = inputs_and_outputs(model, after, data)
        wanted = x @ before.weight.detach().double().T + before.bias.detach().double()
        relative = float((found - wanted).square().sum() / wanted.square().sum())
        row = next(row for row in record.linears if row.name == name)
        assert row.relative_error == pytest.approx(relative, rel=1e-3)


def test_padding_does_not_count() -> None:
    model = tiny_model("bert")
    data = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches(model, 4)]
    padded = [
        {name: torch.cat([t, torch.zeros(8, 5, dtype=torch.int64)], 1) for name, t in batch.items()} for batch in data
    ]
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    records = sparsify(one, data, sparsity=0.5), sparsify(other, padded, sparsity=0.5)
    assert records[0].n_tokens == records[1].n_tokens == 4 * 8 * 9
    torch.testing.assert_close(states(one, data), states(other, data), rtol=1e-2, atol=1e-2)


def test_passes_keep_zeros_and_end_at_the_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.compression import sparsity as module

    history: list[tuple[str, Tensor]] = []
    fit = module._fit

    def watched(name: str, linear: nn.Linear, *rest: object) -> object:
        result = fit(name, linear, *rest)  # type: ignore[arg-type]
        history.append((name, linear.weight == 0))
        return result

    monkeypatch.setattr(module, "_fit", watched)
    model = tiny_model("bert")
    steps: list[tuple[int, int]] = []
    config = SparsityConfig(sparsity=0.75, passes=2)
    record = sparsify_model(
        model, iter(batches(model)), config, memory_limit_bytes=PLENTY, progress=lambda *step: steps.append(step)
    )
    assert record.sparsity == 0.75
    assert steps == [(done, 2 * 12) for done in range(1, 25)]  # q, k and v are one input
    for name in prunable_linears(model):
        first, second = (zeros for other, zeros in history if other == name)
        assert int(first.sum()) == first.numel() // 2  # half the weights in each of two passes
        assert bool((second | ~first).all())


def test_several_passes_do_not_lose_to_one_by_much() -> None:
    dense = tiny_model("bert")
    divergence = divergence_from(dense, batches(dense))
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
    assert not prunable_linears(model)["encoder.layer.0.intermediate.dense"].weight[:, :6].any()
    assert bool(torch.isfinite(states(model, batches(model))).all())


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    record = sparsify(tiny_model("bert"), sparsity=0.5, pattern="block4")
    record.save(tmp_path / "sparsity.json")
    assert SparsityRecord.load(tmp_path / "sparsity.json") == record


# --- sensitivity -----------------------------------------------------------------------------------------------------


def test_sensitive_linears_stay_denser_at_the_same_number_of_zeros() -> None:
    dense = tiny_model("bert")
    model, data = copy.deepcopy(dense), batches(dense)
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
    for name, linear in prunable_linears(alone).items():
        if name != QUERY:
            linear.load_state_dict(prunable_linears(dense)[name].state_dict())
    measured = {row.name: row.sensitivity for row in record.linears}
    assert measured[QUERY] == pytest.approx(divergence(alone), rel=1e-3)
    assert measured[last] is not None


def test_measuring_leaves_the_weights_as_they_were() -> None:
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())

    def stop_at_the_last(candidate: nn.Module) -> float:
        changed = [name for name, value in candidate.state_dict().items() if not torch.equal(value, before[name])]
        assert changed
        assert len({name.rpartition(".")[0] for name in changed}) == 1
        return float("nan") if changed[0].startswith("encoder.layer.2.output") else 1.0

    config = SparsityConfig(distribution="sensitivity")
    with pytest.raises(NumericalError, match=r"encoder\.layer\.2\.output\.dense"):
        sparsify_model(model, batches(model, 3), config, memory_limit_bytes=PLENTY, divergence=stop_at_the_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sensitivity_needs_a_divergence() -> None:
    with pytest.raises(ValueError, match="divergence"):
        sparsify(tiny_model("bert"), distribution="sensitivity")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000)), min_size=1, max_size=12),
    st.floats(0.02, 0.98),
)
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
        prunable_linears(model)["encoder.layer.0.attention.output.dense"].bias[0] = float("nan")
    with pytest.raises(NumericalError, match=r"encoder\.layer\.0\.intermediate\.dense"):
        sparsify(model)
    model = tiny_model("bert")
    with torch.no_grad():
        prunable_linears(model)[QUERY].weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="query"):
        sparsify(model)
    assert not prunable_linears(model)[QUERY]._forward_pre_hooks


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
        sparsify_model(model, batches(model), SparsityConfig(), memory_limit_bytes=limit)
    sparsify_model(model, batches(model), SparsityConfig(), memory_limit_bytes=sparsity_bytes(64, 32))


# --- zeros in training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_in_training(optimizer: type[torch.optim.Optimizer], bf16: bool) -> None:
    model = tiny_model("distilbert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    masks, start = zero_masks(model), copy.deepcopy(model.state_dict())
    data = batches(model, 3)
    with held(model, masks):
        steps = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)  # type: ignore[call-arg]
        for batch in data:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(**batch).last_hidden_state.float().sin().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            steps.zero_grad()
    for name, linear in prunable_linears(model).items():
        assert torch.equal(linear.weight == 0, masks[name])
        assert not torch.equal(linear.weight, start[f"{name}.weight"])
        assert not linear.weight._backward_hooks


def test_frozen_linears_are_held_as_they_are() -> None:
    model = tiny_model("bert").requires_grad_(False)
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    with held(model, zero_masks(model)):
        assert not prunable_linears(model)[QUERY].weight._backward_hooks


def test_momentum_from_before_is_noticed() -> None:
    model = tiny_model("bert")
    steps = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step() -> None:
        steps.zero_grad()
        model(**tiny_inputs(model)).last_hidden_state.sin().sum().backward()
        steps.step()

    step()
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    with pytest.raises(NumericalError, match="optimiser"), held(model, zero_masks(model)):
        step()


def test_masks_of_another_model_are_refused() -> None:
    model = tiny_model("bert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    masks = zero_masks(model)
    with pytest.raises(UsageError, match="wherever its mask"), held(tiny_model("bert"), masks):
        pass
    with pytest.raises(UsageError, match="as in the mask"), held(random_resized(model, {"0.attention": 2}), masks):
        pass
    with pytest.raises(UsageError, match="no such linear"), held(tiny_model("distilbert"), masks):
        pass
    assert not prunable_linears(model)[QUERY].weight._backward_hooks


def test_hooks_go_when_training_fails() -> None:
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="disk"), held(model, zero_masks(model)):
        raise RuntimeError("disk")
    assert not prunable_linears(model)[QUERY].weight._backward_hooks


# --- random zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_random_zeros_have_sparsity_and_pattern(pattern: str) -> None:
    models = [random_resized(tiny_model("bert"), {"0.ffn": 13, "1.attention": 0}) for _ in range(3)]
    config = SparsityConfig.model_validate({"sparsity": 0.8, "pattern": pattern})
    for model, seed in zip(models, (0, 0, 1), strict=True):
        random_masks(model, config, seed)
    masks = [zero_masks(model) for model in models]
    for name, mask in masks[0].items():
        assert float(mask.double().mean()) == pytest.approx(0.8, abs=0.03)
        assert torch.equal(mask, masks[1][name])
        assert not torch.equal(mask, masks[2][name])
        if pattern == "block4":
            assert all(torch.equal(group.any(1), group.all(1)) for group in mask.split(4, dim=1))
        else:
            assert int(mask.sum()) == round(0.8 * mask.numel())


# --- zeros in files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "task"),
    [(name, task) for name in ("bert", "distilbert", "mpnet") for task in (None, "text-classification")]
    + [("vit", None)],
)
def test_exported_zeros_are_found(model_type: str, task: str | None, tmp_path: Path) -> None:
    model = tiny_model(model_type, task)
    model = resize(model, random_entries(model, SIZES))
    random_masks(model, SparsityConfig(sparsity=0.7), 0)
    settings = ExportSettings(seq_len=16)
    output = "logits" if task or model_type == "vit" else "last_hidden_state"
    export_encoder(model, dummy_inputs(model, settings), [output], tmp_path / "model.onnx", settings)
    check_masks_in_onnx(tmp_path / "model.onnx", model)


def test_other_zeros_name_the_linear(tmp_path: Path) -> None:
    model = tiny_model("bert")
    random_masks(model, SparsityConfig(sparsity=0.5), 0)
    path = export(model, tmp_path / "model.onnx")
    name = "encoder.layer.1.output.dense"
    linear = prunable_linears(model)[name]
    place = tuple(linear.weight.detach().nonzero()[0].tolist())
    value = linear.weight[place].item()
    with torch.no_grad():
        linear.weight[place] = 0  # the file has a weight that the model has not
    with pytest.raises(ParityError, match=r"encoder\.layer\.1\.output\.dense.*1 of them lost and 0"):
        check_masks_in_onnx(path, model)
    with torch.no_grad():
        linear.weight[place] = value
        linear.weight[tuple((linear.weight == 0).nonzero()[0].tolist())] = 1.0  # and the other way round
    with pytest.raises(ParityError, match=r"encoder\.layer\.1\.output\.dense.*0 of them lost and 1"):
        check_masks_in_onnx(path, model)


def test_other_models_and_files_are_errors(tmp_path: Path) -> None:
    model = tiny_model("bert")
    path = export(random_resized(model, {"1.attention": 0}), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"encoder\.layer\.1\.attention\.self\.query .*no such node"):
        check_masks_in_onnx(path, model)
    path = export(random_resized(model, {"0.ffn": 8}), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"intermediate\.dense with \[32, 64\] weights.*\[32, 8\]"):
        check_masks_in_onnx(path, model)
    with pytest.raises(CorruptArtifactError, match="missing"):
        check_masks_in_onnx(tmp_path / "missing.onnx", model)
    (tmp_path / "broken.onnx").write_bytes(b"\x0a\xff\xffno model")
    with pytest.raises(CorruptArtifactError, match="broken"):
        check_masks_in_onnx(tmp_path / "broken.onnx", model)


def quantized(path: Path, target: Path, form: str, *, asymmetric: bool = False) -> Path:
    """The file with integer weights: behind DequantizeLinear (`qdq`), or in MatMulInteger (`integer`)."""
    model = onnx.load(path)
    graph = model.graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays]:
        weight = numpy_helper.to_array(arrays[node.input[1]])
        scale = np.abs(weight).max(0).astype(np.float32) / 100  # one for each output
        zero_point = np.arange(weight.shape[1]).astype(np.uint8) + 100 if asymmetric else np.zeros(len(scale), np.int8)
        integers = (np.round(weight / scale) + zero_point).astype(zero_point.dtype)
        name = node.input[1]
        for suffix, array in (("q", integers), ("scale", scale), ("zero", zero_point)):
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{name}_{suffix}"))
        if form == "qdq":
            inputs = [f"{name}_q", f"{name}_scale", *([f"{name}_zero"] if asymmetric else [])]
            graph.node.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_d"], axis=1))
            node.input[1] = f"{name}_d"
        else:
            points = ["", f"{name}_zero"] if asymmetric else []
            node.op_type, node.name = "MatMulInteger", f"{node.name}_quant"
            del node.input[:]
            node.input.extend(["x", f"{name}_q", *points])
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_integer_weights_keep_the_zeros(form: str, asymmetric: bool, tmp_path: Path) -> None:
    model = tiny_model("bert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    path = quantized(export(model, tmp_path / "a.onnx"), tmp_path / "b.onnx", form, asymmetric=asymmetric)
    check_masks_in_onnx(path, model)  # small weights round to zero, too: they are no error
    linear = prunable_linears(model)[QUERY]
    with torch.no_grad():
        linear.weight[linear.weight.abs() == linear.weight.abs().max()] = 0
    with pytest.raises(ParityError, match="1 of them lost"):
        check_masks_in_onnx(path, model)


@pytest.mark.parametrize(
    ("method", "engine", "per_channel"),
    [("dynamic", "onnxruntime", True), ("static", "onnxruntime", True), ("static", "deepsparse", False)],
)
def test_files_of_our_quantizer_keep_the_zeros(
    method: str, engine: EngineName, per_channel: bool, tmp_path: Path
) -> None:
    model = tiny_model("distilbert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    settings = ExportSettings(shapes="static", batch_size=2, seq_len=9, opset=16)
    source, target = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export_encoder(model, dummy_inputs(model, settings), ["last_hidden_state"], source, settings)
    config = Int8Config.model_validate({"method": method, "per_channel": per_channel})
    data = [{name: value.numpy() for name, value in batch.items()} for batch in [tiny_inputs(model)]]
    quantize(source, target, config, engine=engine, reduce_range=True, batches=data)
    check_masks_in_onnx(target, model)


def test_a_gemm_with_transposed_weights_and_a_product_of_two_activations(tmp_path: Path) -> None:
    """Forms that other exporters write: Gemm with [outputs, inputs]; and a right-hand side that is not constant."""
    model = random_resized(tiny_model("bert", num_hidden_layers=1), {"0.attention": 0, "0.ffn": 8})
    random_masks(model, SparsityConfig(sparsity=0.5), 0)
    first, second = prunable_linears(model).items()
    weights = {"a": first[1].weight.detach().numpy(), "b": second[1].weight.detach().numpy()}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32])]
    nodes = [
        helper.make_node("Identity", ["b"], ["same"]),
        helper.make_node("Gemm", ["x", "a"], ["h"], name=f"/{first[0].replace('.', '/')}/Gemm", transB=1),
        helper.make_node("Gemm", ["h", "same"], ["y"], name=f"/m/{second[0].replace('.', '/')}/Gemm", transB=1),
    ]
    check_masks_in_onnx(write(tmp_path / "a.onnx", nodes, inputs, outputs, weights), model)
    nodes[0] = helper.make_node("Mul", ["b", "b"], ["same"])
    with pytest.raises(ParityError, match="without constant weights"):
        check_masks_in_onnx(write(tmp_path / "b.onnx", nodes, inputs, outputs, weights), model)
