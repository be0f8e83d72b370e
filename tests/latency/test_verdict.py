"""What intervals say about targets, for the report and for the closed loop."""

from __future__ import annotations

import pytest

from ziplm_deploy.latency.benchmark import AA, precise_within
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.latency.verdict import keeps, outcome, settled_for
from ziplm_deploy.recipe import BenchmarkConfig

SETTINGS = BenchmarkConfig()  # tolerance 2 %, overshoot 10 %
QUIET = {AA: Ratio(1.0, 0.99, 1.01)}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.97, 2.03, "reached"),
        (1.97, 2.6, "reached"),
        (2.21, 2.6, "faster than asked"),
        (1.90, 1.95, "missed"),
        (1.95, 2.10, "undecided"),
        (0.45, 4.71, "undecided"),
    ],
)
def test_an_outcome_needs_the_whole_interval(low: float, high: float, expected: str) -> None:
    assert outcome(Ratio((low + high) / 2, low, high), 2.0, SETTINGS) == expected


def test_a_benchmark_goes_on_while_an_interval_is_wide() -> None:
    decided = precise_within(SETTINGS.tolerance)
    narrow, other = Ratio(2.0, 1.98, 2.02), Ratio(3.0, 2.98, 3.02)
    assert decided({**QUIET, "2x": narrow, "2x int8": other})
    assert not decided({**QUIET, "2x": narrow, "2x int8": Ratio(3.0, 2.9, 3.1)})
    assert not decided({AA: Ratio(1.015, 1.005, 1.025), "2x": narrow})


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (Ratio(2.01, 1.97, 2.05), True),
        (Ratio(1.975, 1.961, 1.99), False),  # fast enough, but hardly: the next measurement would find it too slow
        (Ratio(1.98, 1.94, 2.02), None),
        (Ratio(1.90, 1.85, 1.95), False),
        (Ratio(2.4, 2.3, 2.5), False),
    ],
)
def test_the_loop_keeps_corrects_or_measures_on(ratio: Ratio, expected: bool | None) -> None:
    assert keeps(ratio, 2.0, SETTINGS) is expected
    settled = settled_for({"2x": 2.0}, SETTINGS)
    assert settled({**QUIET, "2x": ratio}) == (expected is not None)
    assert not settled({AA: Ratio(1.0, 0.7, 1.4), "2x": ratio})
