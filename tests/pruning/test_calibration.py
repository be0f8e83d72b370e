"""Statistics against the inputs that really arrive, padding, memory limits and broken activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import MODEL_TYPES, tiny_causal_model, tiny_inputs, tiny_model
from ziplm_deploy.errors import DataError, NumericalError, UsageError
from ziplm_deploy.models.modules import output_linear, prunable_modules
from ziplm_deploy.pruning.calibration import collect_statistics, iter_statistics, module_groups, statistics_bytes

PLENTY = 2**30


def inputs_of(model: nn.Module, linear: nn.Linear, batches: list[dict[str, Tensor]]) -> Tensor:
    """What enters ``linear`` at tokens that are not padding, float64 [N, d]."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    rows = [
        x[batch["attention_mask"] == 1] if "attention_mask" in batch else x.flatten(0, 1)
        for x, batch in zip(seen, batches, strict=True)
    ]
    return torch.cat(rows).double()


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "t5"])
def test_moments_equal_the_inputs_moments(model_type: str) -> None:
    model = tiny_model(model_type)
    batches = [tiny_inputs(model, 3, 9, seed) for seed in range(3)]
    modules = prunable_modules(model)
    stats = collect_statistics(model, batches, modules, memory_limit_bytes=PLENTY)
    assert list(stats) == [module.name for module in modules]
    for module in modules:
        x = inputs_of(model, output_linear(model, module), batches)
        found = stats[module.name]
        assert found.n_tokens == len(x)
        torch.testing.assert_close(found.hessian, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox"])
def test_moments_of_language_models_are_those_of_their_tokens(model_type: str) -> None:
    """OPT lays out what enters an FFN without batches."""
    model = tiny_causal_model(model_type)
    ids = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    modules = prunable_modules(model)
    stats = collect_statistics(model, [{"input_ids": ids, "attention_mask": mask}], modules, memory_limit_bytes=PLENTY)
    for module in modules:
        (seen,) = seen_by(output_linear(model, module), model, ids, mask)
        x = seen.reshape(24, -1)[mask.flatten() == 1].double()
        assert stats[module.name].n_tokens == len(x) == 20
        torch.testing.assert_close(stats[module.name].hessian, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def seen_by(linear: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    return seen


def test_padding_does_not_count() -> None:
    model = tiny_model("bert")
    batch = tiny_inputs(model, 2, 8)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(2, 5, dtype=torch.int64)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(2, 5, dtype=torch.int64)], 1),
    }
    modules = prunable_modules(model)
    plain = collect_statistics(model, [batch], modules, memory_limit_bytes=PLENTY)
    with_padding = collect_statistics(model, [padded], modules, memory_limit_bytes=PLENTY)
    for name, stats in plain.items():
        assert with_padding[name].n_tokens == stats.n_tokens == 16
        torch.testing.assert_close(with_padding[name].hessian, stats.hessian, rtol=1e-4, atol=1e-5)


def test_streaming_in_groups_changes_nothing() -> None:
    model = tiny_model("bert")
    batches = [tiny_inputs(model, 3, 9, seed) for seed in range(2)]
    modules = prunable_modules(model)
    whole = collect_statistics(model, batches, modules, memory_limit_bytes=PLENTY)
    limit = statistics_bytes(modules[:3])
    assert len(module_groups(modules, limit)) > 1
    steps: list[tuple[int, int]] = []
    streamed = dict(
        iter_statistics(
            model, iter(batches), modules, memory_limit_bytes=limit, progress=lambda *step: steps.append(step)
        )
    )
    assert list(streamed) == list(whole)
    for name, stats in whole.items():
        torch.testing.assert_close(streamed[name].hessian, stats.hessian, rtol=0, atol=0)
    total = len(module_groups(modules, limit)) * len(batches)
    assert steps == [(step, total) for step in range(1, total + 1)]


def test_groups_keep_order_and_limit() -> None:
    modules = prunable_modules(tiny_model("bert"))
    limit = statistics_bytes(modules[:2])
    groups = module_groups(modules, limit)
    assert [module for group in groups for module in group] == modules
    assert all(statistics_bytes(group) <= limit for group in groups)


def test_a_limit_that_is_too_small_is_named() -> None:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    with pytest.raises(UsageError, match=r"prune\.memory_limit_gb"):
        collect_statistics(model, [tiny_inputs(model)], modules, memory_limit_bytes=statistics_bytes(modules) - 1)
    with pytest.raises(UsageError, match=r"0\.ffn"):
        module_groups(modules, statistics_bytes(modules[:1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_the_module(value: float) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        output_linear(model, prunable_modules(model)[2]).bias[0] = value  # 1.attention: spoils what comes after it
    with pytest.raises(NumericalError, match=r"1\.ffn"):
        collect_statistics(model, [tiny_inputs(model)], prunable_modules(model), memory_limit_bytes=PLENTY)
    assert not output_linear(model, prunable_modules(model)[0])._forward_pre_hooks  # hooks are gone after an error


def test_no_tokens_is_a_data_error() -> None:
    model = tiny_model("bert")
    modules = prunable_modules(model)
    with pytest.raises(DataError, match="no"):
        collect_statistics(model, [], modules, memory_limit_bytes=PLENTY)
    batch = tiny_inputs(model)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(DataError, match="padding"):
        collect_statistics(model, [batch], modules, memory_limit_bytes=PLENTY)


def test_model_mode_and_hooks_are_restored() -> None:
    model = tiny_model("bert").train()
    collect_statistics(model, [tiny_inputs(model)], prunable_modules(model), memory_limit_bytes=PLENTY)
    assert model.training
    assert not output_linear(model, prunable_modules(model)[0])._forward_pre_hooks


def test_a_large_mean_does_not_eat_the_variance() -> None:
    """float32 sums of squares around 1e4 would lose a spread of 1e-2 completely."""
    from ziplm_deploy.models.modules import PrunableModule
    from ziplm_deploy.pruning.calibration import _Moments

    generator = torch.Generator().manual_seed(0)
    spread = 0.25 * torch.randn(4000, 5, generator=generator)
    x = 1e4 + spread
    moments = _Moments(PrunableModule(0, "ffn", 5, 1))
    for part in x.split(500):
        moments.add(part)
    exact = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(moments.finish().covariance(), exact, rtol=1e-3, atol=1e-5)
