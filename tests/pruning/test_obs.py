"""OBS against naive elimination, the closed form, brute force and the error identities."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziplm_deploy.errors import NumericalError
from ziplm_deploy.pruning.kernels import obs

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))


def problem(r: int, n: int, m: int, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Correlated inputs with a wide spectrum: H [n·m, n·m] damped, W [r, n·m]."""
    generator = torch.Generator().manual_seed(seed)
    d = n * m
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    X = mix @ (
        torch.logspace(0, -2, d, dtype=torch.float64)[:, None]
        * torch.randn(d, tokens or 4 * d + 3, generator=generator, dtype=torch.float64)
    )
    W = torch.randn(r, d, generator=generator, dtype=torch.float64)
    return obs.damp(X @ X.T / X.shape[1], 0.01)[0], W


def energy(H: Tensor, change: Tensor) -> float:
    """½ tr(Δ H Δᵀ)."""
    return 0.5 * float(torch.trace(change @ H @ change.T))


def columns_of(groups: Tensor, m: int) -> Tensor:
    return (groups[:, None] * m + torch.arange(m)).flatten()


def naive(H: Tensor, W: Tensor, m: int) -> tuple[list[int], list[float], list[Tensor]]:
    """One group at a time on full matrices, straight from the formulas: order, scores, weights after each step."""
    W, G = W.clone(), torch.linalg.inv(H)
    left, order, scores, weights = list(range(W.shape[1] // m)), [], [], []
    while left:
        rho = {}
        for group in left:
            M = slice(group * m, group * m + m)
            rho[group] = 0.5 * float(torch.trace(W[:, M] @ torch.linalg.inv(G[M, M]) @ W[:, M].T))
        best = min(rho, key=rho.__getitem__)
        M = slice(best * m, best * m + m)
        inverse = torch.linalg.inv(G[M, M])
        W = W - W[:, M] @ inverse @ G[M]
        G = G - G[:, M] @ inverse @ G[M]
        order.append(best)
        scores.append(rho[best])
        left.remove(best)
        W[:, columns_of(torch.tensor(order), m)] = 0
        weights.append(W.clone())
    return order, scores, weights


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_order_and_scores_equal_naive_elimination(shape: tuple[int, int, int, int]) -> None:
    H, W = problem(*shape)
    order, scores = obs.removal_order(H, W, shape[2])
    expected_order, expected_scores, _ = naive(H, W, shape[2])
    assert order.tolist() == expected_order
    torch.testing.assert_close(scores, torch.tensor(expected_scores, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(200, 1), (150, 1), (64, 1), (65, 1), (40, 3), (9, 70)])
def test_panels_and_compaction_change_nothing(n: int, m: int) -> None:
    """More columns than a panel holds, panels that fill exactly, and groups wider than a panel."""
    H, W = problem(17, n, m, seed=1)
    order, scores = obs.removal_order(H, W, m)
    expected_order, expected_scores, _ = naive(H, W, m)
    assert order.tolist() == expected_order
    torch.testing.assert_close(scores, torch.tensor(expected_scores, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_levels_equal_elimination_and_closed_form(shape: tuple[int, int, int, int]) -> None:
    H, W = problem(*shape)
    _r, n, m, _ = shape
    order, scores = obs.removal_order(H, W, m)
    _, _, weights = naive(H, W, m)
    for level in obs.level_weights(H, W, order, range(n + 1)):
        kept = columns_of(level.kept, m)
        assert level.kept.tolist() == sorted(order[n - level.size :].tolist())
        closed = W @ H[:, kept] @ torch.linalg.inv(H[kept][:, kept])  # [r, k]
        torch.testing.assert_close(level.weight, closed, rtol=1e-6, atol=1e-8)
        eliminated = weights[n - level.size - 1] if level.size < n else W
        torch.testing.assert_close(level.weight, eliminated[:, kept], rtol=1e-6, atol=1e-7)
        full = torch.zeros_like(W)
        full[:, kept] = level.weight
        expected = energy(H, W - full)
        assert level.damped_error == pytest.approx(2 * expected, rel=1e-6, abs=1e-8)
        # the scores of the steps up to here add up to the error of the weights here
        assert float(scores[: n - level.size].sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_scores_sum_to_the_energy_of_everything() -> None:
    H, W = problem(11, 130, 1, seed=3)
    _, scores = obs.removal_order(H, W, 1)
    assert float(scores.sum()) == pytest.approx(energy(H, W), rel=1e-9)


@pytest.mark.parametrize("m", [1, 2])
def test_the_first_removal_is_the_best_of_all_by_brute_force(m: int) -> None:
    for seed in range(10):
        H, W = problem(3, 6, m, seed)
        order, scores = obs.removal_order(H, W, m)
        errors = {}
        for group in range(6):
            kept = columns_of(torch.tensor([g for g in range(6) if g != group]), m)
            full = torch.zeros_like(W)
            full[:, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W.T).T
            errors[group] = energy(H, W - full)
        assert int(order[0]) == min(errors, key=errors.__getitem__)
        assert float(scores[0]) == pytest.approx(min(errors.values()), rel=1e-8)


def test_greedy_is_close_to_the_best_subset_by_brute_force() -> None:
    """No subset beats the greedy one on independent inputs; on correlated ones greedy stays near the optimum."""
    for seed, correlated in itertools.product(range(5), (False, True)):
        H, W = problem(4, 8, 1, seed)
        if not correlated:
            H = torch.diag(H.diagonal())
        _order, scores = obs.removal_order(H, W, 1)
        greedy = float(scores[:4].sum())
        best = min(
            energy(H, W) - 0.5 * float(torch.trace(B @ torch.linalg.solve(H[list(k)][:, list(k)], B.T)))
            for k in itertools.combinations(range(8), 4)
            for B in [W @ H[:, list(k)]]
        )
        assert greedy >= best - 1e-9
        assert greedy <= (1.5 if correlated else 1 + 1e-9) * best


def test_joint_weights_and_bias_come_from_the_centred_hessian() -> None:
    """Least squares with an intercept on raw data = OBS on the covariance, bias ``b + (W - Ŵ) μ``."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(7, 400, generator=generator, dtype=torch.float64) + 3
    X = torch.randn(7, 7, generator=generator, dtype=torch.float64) @ X
    W, b = torch.randn(5, 7, generator=generator, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    mean = X.mean(1)
    covariance = (X - mean[:, None]) @ (X - mean[:, None]).T / 400
    order, _ = obs.removal_order(covariance, W, 1)
    (level,) = obs.level_weights(covariance, W, order, [3])
    regressors = torch.cat([X[level.kept], torch.ones(1, 400, dtype=torch.float64)])
    solution = torch.linalg.lstsq(regressors.T, (W @ X + b[:, None]).T).solution.T  # [5, 4]
    torch.testing.assert_close(level.weight, solution[:, :3], rtol=1e-7, atol=1e-8)
    bias = b + W @ mean - level.weight @ mean[level.kept]
    torch.testing.assert_close(bias, solution[:, 3], rtol=1e-7, atol=1e-7)


def test_double_precision_does_not_drift() -> None:
    """After hundreds of downdates the remaining scores still equal a fresh factorization; float32 ones do not."""
    H, W = problem(16, 300, 1, seed=5)
    order, scores = obs.removal_order(H, W, 1)
    _, single = obs.removal_order(H.float(), W.float(), 1)
    left = order[270:]
    fresh_W = torch.linalg.solve(H[left][:, left], H[left] @ W.T).T
    _, fresh = obs.removal_order(H[left][:, left], fresh_W, 1)
    torch.testing.assert_close(scores[270:], fresh, rtol=1e-6, atol=1e-10)
    exact = energy(H, W)
    assert abs(float(scores.sum()) - exact) < 1e-10 * exact
    assert abs(float(single.sum()) - exact) > 1e-8 * exact  # why the kernel is fed float64


def test_ties_and_zero_columns_go_first_in_index_order() -> None:
    W = torch.ones(2, 5, dtype=torch.float64)
    W[:, [1, 3]] = 0
    order, scores = obs.removal_order(torch.eye(5, dtype=torch.float64), W, 1)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert scores.tolist() == [0, 0, 1, 1, 1]


def test_damping_is_relative_and_recorded() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64))
    damped, used, tried = obs.damp(H, 0.01)
    assert used == pytest.approx(0.02)  # the dead column does not count
    assert tried == [used]
    torch.testing.assert_close(damped, torch.diag(torch.tensor([1.02, 3.02, 1.0], dtype=torch.float64)))
    _, thousandfold, _ = obs.damp(1000 * H, 0.01)
    assert thousandfold == pytest.approx(20)


def test_damping_is_raised_until_it_factorizes() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    H[0, 1] = H[1, 0] = 1.05  # smallest eigenvalue -0.05
    _, used, tried = obs.damp(H, 0.01)
    assert tried == pytest.approx([0.01, 0.03, 0.1])
    assert used == pytest.approx(0.1)


def test_damping_gives_up_with_the_values_it_tried() -> None:
    H = torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"0\.01, 0\.03, 0\.1, 0\.3, 1"):
        obs.damp(H, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damping_refuses_what_is_not_finite(value: float) -> None:
    H = torch.eye(3, dtype=torch.float64)
    H[1, 1] = value
    with pytest.raises(NumericalError, match="finite"):
        obs.damp(H, 0.01)


def test_indefinite_hessian_is_an_error_not_a_guess() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    W = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(NumericalError, match="positive definite"):
        obs.removal_order(H, W, 1)
    with pytest.raises(NumericalError, match="positive definite"):
        list(obs.level_weights(H, W, torch.tensor([0, 1]), [1]))


def test_wrong_shapes_and_sizes_are_named() -> None:
    H, W = problem(2, 6, 1, seed=0)
    with pytest.raises(ValueError, match="group size"):
        obs.removal_order(H, W, 4)
    with pytest.raises(ValueError, match=r"W \[r, 6\]"):
        obs.removal_order(H, W[:, :5], 1)
    with pytest.raises(ValueError, match=r"0\.\.6"):
        list(obs.level_weights(H, W, torch.arange(6), [7]))
