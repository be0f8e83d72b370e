"""Sizes of levels, and what a level refuses to hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziplm_deploy.models.levels import LevelWeights, ffn_widths, head_counts, pareto_levels


def test_bert_widths_are_the_published_ones() -> None:
    widths = ffn_widths(3072)
    assert widths[:6] == [3072, 2765, 2488, 2239, 2016, 1814]
    assert widths[-4:] == [41, 37, 33, 0]
    assert len(widths) == 45


@given(st.integers(1, 9000), st.floats(0.4, 0.97), st.sampled_from([1, 4, 8, 16, 32]))
def test_widths_descend_from_full_to_none_and_align(width: int, ratio: float, align: int) -> None:
    widths = ffn_widths(width, ratio, align)
    assert widths[0] == width
    assert widths[-1] == 0
    assert widths == sorted(set(widths), reverse=True)
    assert all(w % align == 0 for w in widths[1:])


@pytest.mark.parametrize(
    "arguments",
    [{"width": 0}, {"width": 8, "ratio": 1.0}, {"width": 8, "ratio": 0.0}, {"width": 8, "align": 0},
     {"width": 8, "min_fraction": 0.0}],
)  # fmt: skip
def test_impossible_widths_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected width"):
        ffn_widths(**arguments)  # type: ignore[arg-type]


def test_head_counts() -> None:
    assert head_counts(3) == [3, 2, 1, 0]
    with pytest.raises(ValueError, match="at least one head"):
        head_counts(0)


def test_pareto_drops_levels_that_are_not_faster_than_a_wider_one() -> None:
    latencies = {100: 10.0, 90: 10.5, 80: 8.0, 70: 8.0, 60: 7.0, 50: 7.5, 0: 0.0}
    assert pareto_levels([0, 50, 60, 70, 80, 90, 100, 100], latencies) == [100, 80, 60, 0]
    with pytest.raises(KeyError):
        pareto_levels([100, 42], latencies)


@given(st.dictionaries(st.integers(0, 50), st.floats(0, 100), min_size=1))
def test_pareto_is_monotone_and_loses_nothing(latencies: dict[int, float]) -> None:
    kept = pareto_levels(list(latencies), latencies)
    assert kept[0] == max(latencies)
    times = [latencies[size] for size in kept]
    assert all(slow > fast for slow, fast in itertools.pairwise(times))
    for size, latency in latencies.items():  # something at least as large is at least as fast
        assert any(other >= size and latencies[other] <= latency for other in kept)


def test_level_checks_its_shapes() -> None:
    level = LevelWeights(torch.tensor([0, 2]), torch.zeros(4, 6), torch.zeros(4), 0.1)
    assert level.size == 2
    with pytest.raises(ValueError, match="int64"):
        LevelWeights(torch.tensor([0, 2], dtype=torch.int32), torch.zeros(4, 6), torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match="multiple of 2"):
        LevelWeights(torch.tensor([0, 2]), torch.zeros(4, 5), torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match="bias"):
        LevelWeights(torch.tensor([0, 2]), torch.zeros(4, 6), torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="multiple of 0"):
        LevelWeights(torch.zeros(0, dtype=torch.int64), torch.zeros(4, 5), torch.zeros(4), 0.1)
