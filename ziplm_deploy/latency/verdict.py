"""What an interval of a measured speedup says about the target: reached, missed, or neither yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ziplm_deploy.latency.benchmark import Decided, quiet
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.recipe import BenchmarkConfig

Outcome = Literal["reached", "missed", "faster than asked", "undecided"]


def outcome(speedup: Ratio, target: float, settings: BenchmarkConfig) -> Outcome:
    """Reached or missed where the whole interval lies on one side of what ``tolerance`` allows, else undecided."""
    allowed = target * (1 - settings.tolerance)
    if speedup.low > target * (1 + settings.overshoot):
        return "faster than asked"
    if speedup.low >= allowed:
        return "reached"
    return "missed" if speedup.high < allowed else "undecided"


def settled_for(targets: Mapping[str, float], settings: BenchmarkConfig) -> Decided:
    """Sure enough when it is known of every target's file whether to keep it, for the closed loop."""

    def decided(ratios: Mapping[str, Ratio]) -> bool:
        open_ones = (keeps(ratios[name], target, settings) is None for name, target in targets.items())
        return quiet(ratios, settings.tolerance) and not any(open_ones)

    return decided


def keeps(speedup: Ratio, target: float, settings: BenchmarkConfig) -> bool | None:
    """Whether the closed loop keeps a file as it is; None: its interval holds the target, and more than it may.

    Kept is what a second, independent measurement is likely to find fast enough, too: its whole interval is, and the
    measured value itself leaves half of the tolerance.
    """
    found = outcome(speedup, target, settings)
    if found == "reached" and speedup.value >= target * (1 - settings.tolerance / 2):
        return True
    return None if found == "undecided" and speedup.high >= target else False
