"""Batched OBS against elimination column by column, the closed form, and exact OBS for rounds and groups of one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziplm_deploy.errors import NumericalError
from ziplm_deploy.pruning.kernels import obs
from ziplm_deploy.pruning.kernels.batched_obs import batched_order, round_sizes


def problem(r: int, n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs: H [n·m, n·m] damped, W [r, n·m]."""
    generator = torch.Generator().manual_seed(seed)
    d = n * m
    X = torch.randn(d, d, generator=generator).double() @ torch.randn(d, 4 * d + 3, generator=generator).double()
    W = torch.randn(r, d, generator=generator).double()
    return obs.damp(X @ X.T / X.shape[1], 0.01)[0], W


def pivots_by_elimination(G: Tensor) -> list[float]:
    """Diagonal of G when its turn comes, columns leaving one after the other."""
    G, found = G.clone(), []
    for j in range(len(G)):
        found.append(float(G[j, j]))
        G = G - torch.outer(G[:, j], G[j]) / G[j, j]
    return found


def naive(H: Tensor, W: Tensor, m: int, rounds: list[int]) -> tuple[list[int], list[float]]:
    """Order and errors from what the closed form leaves after each round, everything computed anew."""
    left = list(range(W.shape[1] // m))
    order: list[int] = []
    errors: list[float] = []
    for size in rounds:
        columns = [group * m + k for group in left for k in range(m)]
        G = torch.linalg.inv(H[columns][:, columns])
        weights = W @ H[:, columns] @ G  # the best for the columns that are left
        of_group = {}
        for place, group in enumerate(left):
            block = slice(place * m, place * m + m)
            power = weights[:, block].square().sum(0).tolist()
            pivots = pivots_by_elimination(G[block, block])
            of_group[group] = 0.5 * sum(a / b for a, b in zip(power, pivots, strict=True))
        leaving = sorted(left, key=of_group.__getitem__)[:size]
        order += leaving
        errors += [of_group[group] for group in leaving]
        left = [group for group in left if group not in leaving]
    return order + left, errors


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.data())
def test_rounds_equal_everything_computed_anew(r: int, n: int, m: int, data: st.DataObject) -> None:
    H, W = problem(r, n, m, data.draw(st.integers(0, 9999)))
    rounds: list[int] = []
    while sum(rounds) < n and data.draw(st.booleans()):
        rounds.append(data.draw(st.integers(1, n - sum(rounds))))
    order, scores = batched_order(H, W, m, rounds)
    expected_order, expected_scores = naive(H, W, m, rounds)
    assert order.tolist() == expected_order
    torch.testing.assert_close(scores, torch.tensor(expected_scores).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_single_columns_one_at_a_time_are_exact_obs(seed: int) -> None:
    H, W = problem(5, 20, 1, seed)
    order, scores = batched_order(H, W, 1, [1] * 20)
    exact_order, exact_scores = obs.removal_order(H, W, 1)
    assert order.tolist() == exact_order.tolist()
    torch.testing.assert_close(scores, exact_scores, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_head_is_no_more_than_approximate(seed: int) -> None:
    """It differs from the exact one where a head's columns are correlated, and only there."""
    H, W = problem(5, 4, 3, seed)
    G = torch.linalg.inv(H)
    exact = torch.stack([_exact(G, W, slice(k, k + 3)) for k in range(0, 12, 3)])
    _, scores = batched_order(H, W, 3, [4])
    assert not torch.allclose(scores, exact.sort().values, rtol=1e-3)
    diagonal = torch.diag(H.diagonal())
    _, scores = batched_order(diagonal, W, 3, [4])
    power = 0.5 * (W.square().sum(0) * diagonal.diagonal()).reshape(4, 3).sum(1)
    torch.testing.assert_close(scores, power.sort().values)


def _exact(G: Tensor, W: Tensor, M: slice) -> Tensor:
    return 0.5 * torch.trace(W[:, M] @ torch.linalg.inv(G[M, M]) @ W[:, M].T)


@given(st.integers(0, 20_000))
def test_round_sizes_follow_their_rule(T: int) -> None:
    left, g = T, (T - 512) // 2
    for size in round_sizes(T):
        assert size == min(left, max(g, 64), 1024)
        left, g = left - size, (g - 512) // 2
    assert left == 0


def test_round_sizes_of_some_widths() -> None:
    assert round_sizes(0) == []
    assert round_sizes(1) == [1]
    assert round_sizes(150) == [64, 64, 22]
    assert round_sizes(1024)[:2] == [256, 64]
    assert round_sizes(5504)[:4] == [1024, 992, 240, 64]


def test_nothing_removed_leaves_the_groups_in_their_order() -> None:
    H, W = problem(3, 6, 2, 0)
    order, scores = batched_order(H, W, 2, [])
    assert (order.tolist(), scores.tolist()) == ([0, 1, 2, 3, 4, 5], [])


def test_columns_of_no_weight_leave_first() -> None:
    H, W = problem(4, 10, 1, 1)
    W[:, [3, 7]] = 0
    order, scores = batched_order(H, W, 1, [2])
    assert order[:2].tolist() == [3, 7]
    assert scores.tolist() == [0, 0]
    assert order[2:].tolist() == [0, 1, 2, 4, 5, 6, 8, 9]


def test_bad_arguments_are_refused() -> None:
    H, W = problem(3, 6, 1, 0)
    with pytest.raises(ValueError, match="group size"):
        batched_order(H, W, 4, [1])
    with pytest.raises(ValueError, match=r"W \[r, 6\]"):
        batched_order(H, W[:, :5], 1, [1])
    with pytest.raises(ValueError, match="at most 6"):
        batched_order(H, W, 1, [4, 3])
    with pytest.raises(ValueError, match="at most 6"):
        batched_order(H, W, 1, [0, 3])
    with pytest.raises(NumericalError, match="damping"):
        batched_order(-H, W, 1, [1])
