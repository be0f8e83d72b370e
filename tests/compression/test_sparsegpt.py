"""The sweep against the closed form and a naive sweep, exact counts, patterns, and zeros that stay."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziplm_deploy.compression.sparsity import sparsegpt
from ziplm_deploy.compression.sparsity.sparsegpt import (
    BLOCK_COLUMNS,
    GROUP_SIZES,
    Pattern,
    inverse_factor,
    refit,
    sparsify,
)
from ziplm_deploy.errors import NumericalError
from ziplm_deploy.pruning.kernels import obs

SHAPES = st.tuples(st.integers(1, 7), st.integers(2, 14), st.integers(0, 10_000))
SPARSITIES = st.floats(0.05, 0.95)
PATTERNS = st.sampled_from(list(GROUP_SIZES))


def problem(r: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs with a wide spectrum: W [r, d], H [d, d] damped."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, d, dtype=torch.float64)[:, None]
    X = mix @ (scales * torch.randn(d, 4 * d + 3, generator=generator, dtype=torch.float64))
    W = torch.randn(r, d, generator=generator, dtype=torch.float64)
    return W, obs.damp(X @ X.T / X.shape[1], 0.01)[0]


def error(W: Tensor, weight: Tensor, H: Tensor) -> float:
    return float(((W - weight) @ H * (W - weight)).sum())


def best(W: Tensor, H: Tensor, zeros: Tensor) -> Tensor:
    """The closed form W_K = W H_{:,K} (H_KK)⁻¹ of every row."""
    weight = torch.zeros_like(W)
    for row, mask in enumerate(zeros):
        kept = (~mask).nonzero().flatten()
        weight[row, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W[row])
    return weight


def naive_sweep(W: Tensor, H: Tensor, zeros: Tensor) -> Tensor:
    """Column after column, with the inverse of what is left computed anew, straight from the OBS formulas."""
    weight = W.clone()
    for j in range(W.shape[1]):
        G = torch.linalg.inv(H[j:, j:])
        for row in zeros[:, j].nonzero().flatten().tolist():
            weight[row, j:] -= weight[row, j] / G[0, 0] * G[0]
            weight[row, j] = 0
    return weight


def prefix_zeros(r: int, d: int, columns: int) -> Tensor:
    return (torch.arange(d) < columns).expand(r, d).clone()


@settings(max_examples=50, deadline=None)
@given(SHAPES)
def test_the_factor_is_that_of_the_inverse(shape: tuple[int, int, int]) -> None:
    _, H = problem(*shape)
    R = inverse_factor(H)
    assert torch.equal(R, R.triu())
    inverse = torch.linalg.inv(H)
    torch.testing.assert_close(R.T @ R, inverse, rtol=1e-6, atol=1e-9 * float(inverse.abs().max()))


@settings(max_examples=60, deadline=None)
@given(SHAPES, SPARSITIES, PATTERNS)
def test_the_sweep_equals_the_naive_one_with_the_same_zeros(
    shape: tuple[int, int, int], sparsity: float, pattern: Pattern
) -> None:
    W, H = problem(*shape)
    found = sparsify(W, H, sparsity, pattern=pattern, refit_steps=0)
    torch.testing.assert_close(found.weight, naive_sweep(W, H, found.zeros), rtol=1e-6, atol=1e-8)
    assert found.damped_error == pytest.approx(error(W, found.weight, H), rel=1e-6, abs=1e-9)
    assert found.damped_error >= error(W, best(W, H, found.zeros), H) - 1e-9


@pytest.mark.parametrize("pattern", list(GROUP_SIZES))
def test_blocks_of_columns_change_nothing(pattern: Pattern) -> None:
    """More columns than a block, and a last block that is neither full nor a multiple of four."""
    W, H = problem(5, 2 * BLOCK_COLUMNS + 38 + 1, 3)
    found = sparsify(W, H, 0.7, pattern=pattern, refit_steps=0)
    torch.testing.assert_close(found.weight, naive_sweep(W, H, found.zeros), rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(SHAPES, SPARSITIES, PATTERNS)
def test_the_refit_finds_the_best_weights_for_the_zeros(
    shape: tuple[int, int, int], sparsity: float, pattern: Pattern
) -> None:
    W, H = problem(*shape)
    swept = sparsify(W, H, sparsity, pattern=pattern, refit_steps=0)
    with mock.patch.object(sparsegpt, "REFIT_TOLERANCE", 0.0):
        found = sparsify(W, H, sparsity, pattern=pattern, refit_steps=200)
    assert torch.equal(found.zeros, swept.zeros)
    optimum, everything = error(W, best(W, H, found.zeros), H), error(W, 0 * W, H)
    assert found.damped_error == pytest.approx(optimum, rel=1e-4, abs=1e-7 * everything)
    assert found.damped_error <= swept.damped_error + 1e-7 * everything
    assert found.damped_error <= error(W, W.masked_fill(found.zeros, 0), H) + 1e-7 * everything
    soon = sparsify(W, H, sparsity, pattern=pattern)
    assert found.damped_error - 1e-7 * everything <= soon.damped_error <= swept.damped_error + 1e-9 * everything


def test_every_refit_step_lowers_the_error_and_no_zero_moves() -> None:
    W, H = problem(20, 150, 1)
    swept = sparsify(W, H, 0.8, refit_steps=0)
    errors = [swept.damped_error]
    for steps in range(1, 12):
        weight = refit(swept.weight, W, H, swept.zeros, steps)
        assert not weight[swept.zeros].any()
        errors.append(error(W, weight, H))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]
    assert errors[-1] < error(W, W.masked_fill(swept.zeros, 0), H)


def test_both_ways_beat_the_same_zeros_without_compensation() -> None:
    for seed in range(5):
        W, H = problem(30, 100, seed)
        for pattern in GROUP_SIZES:
            for steps in (0, 30):
                found = sparsify(W, H, 0.6, pattern=pattern, refit_steps=steps)
                assert found.damped_error < error(W, W.masked_fill(found.zeros, 0), H)


@pytest.mark.parametrize(("d", "columns"), [(9, 3), (12, 11), (300, 150)])
def test_a_prefix_of_zeros_gives_the_closed_form_from_the_sweep_alone(d: int, columns: int) -> None:
    W, H = problem(6, d, 2)
    zeros = prefix_zeros(6, d, columns)
    found = sparsify(W, H, columns / d, zeros=zeros, refit_steps=0)
    assert torch.equal(found.zeros, zeros)
    torch.testing.assert_close(found.weight, best(W, H, zeros), rtol=1e-5, atol=1e-7)


def test_of_two_weights_the_cheaper_one_goes_by_brute_force() -> None:
    W, H = problem(1, 2, 4)
    W[0, 0] = 1e-3
    found = sparsify(W, H, 0.5)
    errors = [error(W, best(W, H, torch.tensor([[j == 0, j == 1]])), H) for j in range(2)]
    assert found.zeros.tolist() == [[True, False]]
    assert found.damped_error == pytest.approx(min(errors))


def test_uncorrelated_inputs_make_it_magnitude_pruning_by_input_power() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 40, generator=generator, dtype=torch.float64)
    power = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
    found = sparsify(W, torch.diag(power), 0.75)
    score = (W.square() * power).flatten()
    expected = torch.zeros(320, dtype=torch.bool)
    expected[score.argsort()[:240]] = True
    assert torch.equal(found.zeros.flatten(), expected)
    torch.testing.assert_close(found.weight, W.masked_fill(found.zeros, 0))
    groups = sparsify(W, torch.diag(power), 0.75, pattern="block4").zeros.reshape(80, 4)
    sums = score.reshape(80, 4).sum(1)
    assert set(groups.all(1).nonzero().flatten().tolist()) == set(sums.argsort()[:60].tolist())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), SPARSITIES, st.integers(0, 100))
def test_the_number_of_zeros_is_exact(r: int, d: int, sparsity: float, seed: int) -> None:
    W = torch.randn(r, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    H = torch.eye(d, dtype=torch.float64)
    wanted = sparsity * r * d
    found = sparsify(W, H, sparsity)
    assert abs(int(found.zeros.sum()) - wanted) <= 0.5
    assert torch.equal(found.weight == 0, found.zeros)
    assert abs(int(sparsify(W, H, sparsity, pattern="block4").zeros.sum()) - wanted) <= 2.5


@pytest.mark.parametrize("d", [3, 4, 6, 129, 133, 260])
def test_block4_zeroes_neighbouring_inputs_together(d: int) -> None:
    W, H = problem(6, d, 5)
    zeros = sparsify(W, H, 0.5, pattern="block4").zeros
    for group in zeros.split(4, dim=1):
        assert torch.equal(group.any(1), group.all(1))
    assert zeros.any()


@pytest.mark.parametrize("pattern", list(GROUP_SIZES))
def test_zeros_stay_from_pass_to_pass_and_count(pattern: Pattern) -> None:
    W, H = problem(16, 200, 6)
    weight, zeros = W, torch.zeros(16, 200, dtype=torch.bool)
    for sparsity in (0.4, 0.6, 0.8):
        found = sparsify(weight, H, sparsity, pattern=pattern, zeros=zeros, target=W)
        assert not found.weight[zeros].any()
        assert bool((found.zeros | ~zeros).all())
        assert int(found.zeros.sum()) == pytest.approx(sparsity * 3200, abs=2)
        weight, zeros = found.weight, found.zeros
    assert found.damped_error == pytest.approx(error(W, weight, H))


def test_zeros_that_are_more_than_asked_for_are_all_there_is() -> None:
    W, H = problem(4, 10, 7)
    zeros = prefix_zeros(4, 10, 7)
    assert torch.equal(sparsify(W, H, 0.3, zeros=zeros).zeros, zeros)
    everything = torch.ones(4, 10, dtype=torch.bool)
    assert not sparsify(W, H, 0.3, zeros=everything).weight.any()


def test_the_target_is_matched_not_the_weights_at_the_start() -> None:
    W, H = problem(5, 12, 8)
    start = W + 0.5 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sparsify(start, H, 0.5, target=W)
    torch.testing.assert_close(found.damped_error, error(W, best(W, H, found.zeros), H), rtol=2e-2, atol=1e-4)


def test_the_arguments_are_not_changed() -> None:
    W, H = problem(4, 140, 9)
    zeros = prefix_zeros(4, 140, 20)
    copies = W.clone(), H.clone(), zeros.clone()
    sparsify(W, H, 0.6, zeros=zeros)
    assert all(torch.equal(a, b) for a, b in zip((W, H, zeros), copies, strict=True))


def test_dead_inputs_are_the_first_to_go_and_stay_zero() -> None:
    """Their Hessian is a diagonal 1 and their weights are zero: no compensation may fill them."""
    W, H = problem(6, 20, 10)
    H[3:6], H[:, 3:6] = 0, 0
    H.diagonal()[3:6] = 1
    W[:, 3:6] = 0
    for pattern in GROUP_SIZES:
        assert not sparsify(W, H, 0.5, pattern=pattern).weight[:, 3:6].any()
    assert bool(sparsify(W, H, 0.5).zeros[:, 3:6].all())


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_sparsity_outside_is_refused(sparsity: float) -> None:
    W, H = problem(2, 4, 0)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        sparsify(W, H, sparsity)


def test_shapes_that_do_not_match_are_refused() -> None:
    W, H = problem(2, 4, 0)
    with pytest.raises(ValueError, match=r"H \[4, 4\]"):
        sparsify(W, H[:3, :3], 0.5)
    with pytest.raises(ValueError, match="zeros"):
        sparsify(W, H, 0.5, zeros=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="target"):
        sparsify(W, H, 0.5, target=W[:, :3])


def test_numbers_that_are_not_finite_and_an_indefinite_hessian_are_errors() -> None:
    W, H = problem(2, 4, 0)
    with pytest.raises(NumericalError, match="positive definite"):
        sparsify(W, H - 2 * float(H.diagonal().max()) * torch.eye(4, dtype=H.dtype), 0.5)
    with pytest.raises(NumericalError, match="positive definite"):
        sparsify(W, H * float("nan"), 0.5)
    W[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="finite weights"):
        sparsify(W, H, 0.5)
