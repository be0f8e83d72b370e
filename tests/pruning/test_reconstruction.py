"""The closed-form refit against least squares, on every kind of architecture, and its safeguards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers.models import random_level, tiny_inputs, tiny_model
from ziplm_deploy.errors import NumericalError
from ziplm_deploy.models.modules import layers_of, output_module, prunable_modules
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.pruning import reconstruction
from ziplm_deploy.pruning.reconstruction import _Moments, reconstruct

Batch = dict[str, torch.Tensor]
ENCODERS = ("bert", "distilbert", "mpnet", "deberta-v2", "t5", "vit")


def batches(model: nn.Module, n: int = 15) -> list[Batch]:
    return [tiny_inputs(model, batch_size=8, seed=seed) for seed in range(n)]


def pruned(dense: nn.Module, sizes: dict[str, int]) -> nn.Module:
    modules = {module.name: module for module in prunable_modules(dense)}
    return resize(dense, {name: random_level(dense, modules[name], size) for name, size in sizes.items()})


def last_states(model: nn.Module, data: list[Batch]) -> torch.Tensor:
    """Hidden states [N, hidden] of real tokens."""
    rows = []
    with torch.inference_mode():
        for batch in data:
            outputs = model.base_model(**batch).last_hidden_state  # type: ignore[operator, union-attr]
            mask = batch.get("attention_mask")
            rows.append(outputs[mask.bool()] if mask is not None else outputs.flatten(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("model_type", [*ENCODERS, "electra", "gpt_neox"])
def test_the_refit_brings_the_outputs_closer_on_new_data(model_type: str) -> None:
    dense = tiny_model(model_type)
    dense.config.use_cache = False  # type: ignore[union-attr]
    sizes = {"0.attention": 2, "0.ffn": 16, "1.attention": 0, "1.ffn": 0, "2.ffn": 24}
    model = pruned(dense, sizes)
    new = [tiny_inputs(dense, batch_size=8, seed=100 + seed) for seed in range(5)]
    target = last_states(dense, new)
    before = (last_states(model, new) - target).square().mean()
    reconstruct(dense, model, batches(dense))
    after = (last_states(model, new) - target).square().mean()
    assert after < 0.8 * before


def test_modules_that_are_added_together_share_the_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX: were each fitted to the whole drift before its layer, the stream would drift as far the other way."""
    dense = tiny_model("gpt_neox", num_hidden_layers=2, use_cache=False)
    assert dense.config.use_parallel_residual  # type: ignore[union-attr]
    hidden_size: int = dense.config.hidden_size  # type: ignore[union-attr, assignment]
    data, drift = batches(dense), torch.randn(hidden_size, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(dense)
    first = next(module for module in prunable_modules(model) if module.name == "0.ffn")
    with torch.no_grad():
        output_module(model, first).bias.add_(drift)  # type: ignore[operator, union-attr]
    refit = reconstruction._refit
    monkeypatch.setattr(
        reconstruction, "_refit", lambda *given: given[2].layer == 0 or refit(*given)
    )  # which would take the drift away where it comes from

    def stream(of: nn.Module) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = layers_of(of)[-1].register_forward_hook(
            lambda _, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        mask = torch.cat([batch["attention_mask"].bool() for batch in data])
        last_states(of, data)
        hook.remove()
        return torch.cat(kept)[mask]

    before = (stream(model) - stream(dense)).mean(0)
    assert before.norm() > 0.5 * drift.norm()
    reconstruct(dense, model, data)
    assert (stream(model) - stream(dense)).mean(0).norm() < 0.01 * drift.norm()


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_shrunk_model_can_be_the_reference(model_type: str) -> None:
    model = pruned(tiny_model(model_type), {"0.attention": 0, "0.ffn": 40, "1.ffn": 0, "2.attention": 3})
    modules = {module.name: module for module in prunable_modules(model)}
    smaller = resize(model, {n: random_level(model, modules[n], s) for n, s in {"0.ffn": 20, "2.attention": 1}.items()})
    new = [tiny_inputs(model, batch_size=8, seed=100 + seed) for seed in range(5)]
    target = last_states(model, new)
    before = (last_states(smaller, new) - target).square().mean()
    reconstruct(model, smaller, batches(model))
    assert (last_states(smaller, new) - target).square().mean() < 0.9 * before
    assert torch.equal(last_states(model, new), target)


def test_a_dense_model_stays_as_it_is() -> None:
    dense = tiny_model("bert")
    model = copy.deepcopy(dense)
    reconstruct(dense, model, batches(dense))
    for old, new in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)


def test_one_module_is_solved_like_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "RIDGES", (1e-6,))
    dense = tiny_model("bert")
    data = batches(dense, 20)
    model = pruned(dense, {"0.ffn": 12})
    module = next(m for m in prunable_modules(dense) if m.name == "0.ffn")
    inputs, wanted = [], []

    def record(into: list[torch.Tensor], mask: torch.Tensor, value: torch.Tensor) -> None:
        into.append(value[mask.bool()].double())

    for batch in data:
        mask = batch["attention_mask"]
        hooks = [
            output_module(model, module).register_forward_hook(lambda _m, a, _o, mask=mask: record(inputs, mask, a[0])),
            output_module(dense, module).register_forward_hook(lambda _m, _a, o, mask=mask: record(wanted, mask, o)),
        ]
        with torch.inference_mode():
            model(**batch), dense(**batch)
        for hook in hooks:
            hook.remove()
    x, y = torch.cat(inputs), torch.cat(wanted)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    best = torch.linalg.lstsq(design, y).solution  # [d + 1, r]
    reconstruct(dense, model, data)
    linear = output_module(model, module)
    residual = (design @ best - y).square().mean()
    found = (x @ linear.weight.double().T + linear.bias.double() - y).square().mean()
    assert found <= residual * 1.01


def test_too_little_data_leaves_the_weights_alone() -> None:
    dense = tiny_model("bert")
    model = pruned(dense, {"0.ffn": 12})
    before = copy.deepcopy(model.state_dict())
    reconstruct(dense, model, [tiny_inputs(dense, batch_size=4)])  # none is held out: no change can be shown to help
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_dense_model_is_not_changed() -> None:
    dense = tiny_model("bert")
    before = copy.deepcopy(dense.state_dict())
    reconstruct(dense, pruned(dense, {"0.attention": 1, "2.ffn": 8}), batches(dense))
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_activations_that_are_not_finite_are_an_error() -> None:
    dense = tiny_model("bert")
    model = pruned(dense, {"0.ffn": 12})
    with torch.no_grad():
        output_module(model, prunable_modules(dense)[1]).weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NumericalError, match="finite"):
        reconstruct(dense, model, batches(dense))


@pytest.mark.parametrize("deviation", [1.0, 0.1, 0.005])
def test_a_mean_beside_the_inputs_changes_no_covariance(deviation: float) -> None:
    """Variances down to 1e-6 of the squared mean; multiples of 2⁻²⁰ keep their digits when 5 is added to them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 24, generator=generator) * deviation
    x = torch.round(x * 2**20) / 2**20
    y = torch.randn(4000, 8, generator=generator)
    around_zero, around_five = (_Moments(part[:16].mean(0), y[:16].mean(0)) for part in (x, x + 5))
    for rows in torch.arange(4000).split(250):
        around_zero.add(x[rows], y[rows])
        around_five.add(x[rows] + 5, y[rows])
    expected = torch.cov(x.T.double(), correction=0)
    scale = float(expected.diagonal().mean())
    for found in (around_zero, around_five):
        torch.testing.assert_close(found.covariance(), expected, rtol=0, atol=1e-6 * scale)
    near, far = around_zero.solve(0.03), around_five.solve(0.03)
    assert near is not None
    assert far is not None
    torch.testing.assert_close(near[0], far[0], rtol=0, atol=1e-5 * float(near[0].abs().max()))


def test_errors_are_those_of_the_tokens_themselves() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(500, 6, generator=generator) + 30, torch.randn(500, 4, generator=generator) - 7
    moments = _Moments(x[:8].mean(0), y[:8].mean(0))
    moments.add(x, y)
    delta, shift = torch.randn(4, 6, generator=generator).double(), torch.randn(4, generator=generator).double()
    expected = float((y.double() - x.double() @ delta.T - shift).square().sum())
    assert moments.error(delta, shift) == pytest.approx(expected, rel=1e-6)


def test_inputs_whose_mean_drowns_their_covariance_are_refitted() -> None:
    dense = tiny_model("bert")
    up = dense.base_model.encoder.layer[0].intermediate.dense  # type: ignore[operator, union-attr]
    with torch.no_grad():
        up.weight.mul_(0.02)
        up.bias.copy_(torch.rand(len(up.bias), generator=torch.Generator().manual_seed(0)) + 50)
    model = pruned(dense, {"0.ffn": 12})
    data = batches(dense)
    wanted, before = last_states(dense, data), last_states(model, data)
    assert reconstruct(dense, model, data) == []
    assert (last_states(model, data) - wanted).square().mean() < 0.8 * (before - wanted).square().mean()


def test_a_module_that_cannot_be_solved_stays_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Moments, "solve", lambda self, ridge: None)
    dense = tiny_model("bert")
    model = pruned(dense, {"0.ffn": 12})
    before = copy.deepcopy(model.state_dict())
    assert reconstruct(dense, model, batches(dense)) == [module.name for module in prunable_modules(dense)]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_progress_counts_every_module() -> None:
    dense = tiny_model("bert")
    seen: list[tuple[int, int]] = []
    reconstruct(dense, pruned(dense, {"0.ffn": 12}), batches(dense, 6), lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
