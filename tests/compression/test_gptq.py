"""GPTQ: the nearest integers where inputs are independent, lower errors where they are not, memory within its limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from exporters.nbits_matmul import round_blocks
from tests.helpers.models import tiny_causal_model
from ziplm_deploy.compression.int8.fake_quant import quantizable_linears
from ziplm_deploy.compression.int8.gptq import gptq_blocks, input_moments, rounded_by_gptq
from ziplm_deploy.errors import NumericalError
from ziplm_deploy.pruning.moments import moments_bytes


def weight_of(n_outputs: int, n_inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_outputs, n_inputs)).astype(np.float32)


def correlated(n_inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n_inputs, 6, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(6, n_inputs, generator=generator, dtype=torch.float64)
    x += 0.3 * torch.randn(len(x), n_inputs, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


def error(weight: np.ndarray, rounded: np.ndarray, hessian: torch.Tensor) -> float:
    lost = torch.from_numpy(weight - rounded).double()
    return float((lost @ hessian * lost).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_inputs", [32, 40, 300])
def test_independent_inputs_are_rounded_to_the_nearest(n_inputs: int, bits: int) -> None:
    weight = weight_of(5, n_inputs)
    found, plain = gptq_blocks(weight, 3 * torch.eye(n_inputs, dtype=torch.float64), bits), round_blocks(weight, bits)
    np.testing.assert_array_equal(found.integers, plain.integers)
    np.testing.assert_array_equal(found.scales, plain.scales)
    assert (found.n_inputs, found.bits) == (n_inputs, bits)


@pytest.mark.parametrize("n_inputs", [33, 128, 300])
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_lower_where_inputs_are_correlated(n_inputs: int, seed: int) -> None:
    weight, hessian = weight_of(16, n_inputs, seed), correlated(n_inputs, seed)
    found, plain = gptq_blocks(weight, hessian, 4).weight, round_blocks(weight, 4).weight
    assert error(weight, found, hessian) < 0.6 * error(weight, plain, hessian)


def test_what_a_column_lost_is_made_up_for_as_obs_has_it() -> None:
    """Two columns of one block: the second moves by what is then the least squared error, before it is rounded."""
    weight = np.array([[0.31, 0.8]], np.float32)
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    damped = hessian + 0.01 * 2.5 * torch.eye(2, dtype=torch.float64)
    scale = 0.8 / -8
    first = round(0.31 / scale) * scale
    best = 0.8 + (0.31 - first) * float(damped[0, 1] / damped[1, 1])
    second = float(np.clip(round(best / scale), -8, 7) * scale)
    np.testing.assert_allclose(gptq_blocks(weight, hessian, 4).weight, [[first, second]], rtol=1e-5)


def test_inputs_that_are_always_zero_change_nothing() -> None:
    weight, hessian = weight_of(4, 64), correlated(64)
    hessian[7] = hessian[:, 7] = 0
    assert np.isfinite(gptq_blocks(weight, hessian, 4).weight).all()
    nothing = gptq_blocks(np.zeros((4, 64), np.float32), hessian, 4)
    assert not nothing.weight.any()
    unseen = gptq_blocks(weight, torch.zeros(64, 64, dtype=torch.float64), 4)
    np.testing.assert_array_equal(unseen.integers, round_blocks(weight, 4).integers)


def test_moments_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NumericalError, match="expected finite second moments"):
        gptq_blocks(weight_of(4, 32), torch.full((32, 32), torch.nan, dtype=torch.float64), 4)


@pytest.mark.transformers
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_moments_are_those_of_inputs_however_little_memory_there_is(model_type: str) -> None:
    model: Any = tiny_causal_model(model_type)
    linears = quantizable_linears(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(**batches[0])
    for handle in handles:
        handle.remove()
    for limit in (10**9, moments_bytes([max(linear.in_features for linear in linears.values())])):
        found = dict(input_moments(model, batches, linears, limit))
        assert set(found) == set(linears)
        for name, hessian in found.items():
            x = inputs[name][mask.bool()].double()
            torch.testing.assert_close(hessian, x.T @ x / len(x), atol=1e-5, rtol=1e-4)


@pytest.mark.transformers
def test_every_weight_is_rounded_by_what_it_is_multiplied_with() -> None:
    model: Any = tiny_causal_model("llama")
    linears = quantizable_linears(model)
    batches = [{"input_ids": torch.arange(3, 27).reshape(2, 12), "attention_mask": torch.ones(2, 12).long()}]
    weights = {name: linear.weight.detach().numpy() for name, linear in linears.items()}
    found = rounded_by_gptq(model, batches, weights.__getitem__, {name: name for name in weights}, 10**9)
    moments = dict(input_moments(model, batches, linears, 10**9))
    assert set(found) == set(weights)
    for name, blocks in found.items():
        plain = round_blocks(weights[name], 4).weight
        assert error(weights[name], blocks.weight, moments[name]) <= error(weights[name], plain, moments[name])
