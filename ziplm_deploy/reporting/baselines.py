"""Files of the family beside what users get from the dense model without pruning: ahead, beaten, or undecided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.reporting.facts import BaselineFacts, FileFacts
from ziplm_deploy.reporting.records import BaselineReport
from ziplm_deploy.tasks.resampling import Comparison

TORCH, TRAINED_ON = "torch", "dense-trained-on"  # baselines with a part of their own in reports
Standing = Literal["ahead", "beaten", "undecided"]


def baseline_report(record: BenchmarkRecord, facts: BaselineFacts) -> BaselineReport:
    """A baseline as measured and scored."""
    timing = facts.timing
    return BaselineReport(
        name=facts.name,
        title=facts.title,
        tool=facts.record.tool,
        settings=facts.record.settings,
        engine_version=timing.engine_version,
        **BaselineReport.figures(timing),
        size_bytes=facts.size_bytes,
        over_torch=over_torch(record, timing.name),
        accuracy=facts.scores,
        accuracy_intervals=facts.uncertainty.intervals if facts.uncertainty else {},
        of_dense=facts.uncertainty.of_dense if facts.uncertainty else {},
    )


def over_torch(record: BenchmarkRecord, name: str) -> Ratio | None:
    """Speedup of a file over the dense model in torch; None for that itself, or where it was not measured."""
    if name == TORCH or TORCH not in {timing.name for timing in record.variants}:
        return None
    return record.ratio_between(name, TORCH)


def standing(own: Ratio, baseline: Ratio, gain: Comparison, noise: str = "") -> Standing:
    """How a file stands beside a baseline.

    It is beaten where the baseline is faster and scores higher, both beyond the intervals, and ahead where the baseline
    is surely slower or scores surely lower.

    Args:
        own, baseline: their speedups over the dense model, of one benchmark.
        gain: the baseline's score less the file's, on the same examples.
        noise: why no timing can be trusted, if none can: then nothing is decided.
    """
    if noise:
        return "undecided"
    if baseline.high < own.low or gain.high < 0:
        return "ahead"
    return "beaten" if baseline.low > own.high and gain.low > 0 else "undecided"


def beside_baselines(file: FileFacts, baselines: Sequence[BaselineFacts], noise: str) -> dict[Standing, list[str]]:
    """Names of the baselines that were scored as the file was, by how it stands beside them."""
    found: dict[Standing, list[str]] = {"ahead": [], "beaten": [], "undecided": []}
    for baseline in baselines:
        if baseline.name in file.baseline_gains:
            gain = file.baseline_gains[baseline.name]
            found[standing(file.timing.ratio, baseline.timing.ratio, gain, noise)].append(baseline.name)
    return found
