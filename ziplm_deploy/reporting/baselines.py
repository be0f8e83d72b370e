"""Files of the family beside what users get from the dense model without pruning: ahead, beaten, or undecided."""

from __future__ import annotations

from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.reporting.facts import BaselineFacts
from ziplm_deploy.reporting.records import BaselineReport

TORCH = "torch"


def baseline_report(record: BenchmarkRecord, facts: BaselineFacts) -> BaselineReport:
    """A baseline as measured and scored."""
    timing = facts.timing
    return BaselineReport(
        name=facts.name,
        title=facts.title,
        tool=facts.record.tool,
        settings=facts.record.settings,
        engine=timing.engine,
        engine_version=timing.engine_version,
        measured_speedup=timing.speedup,
        measured_low=timing.speedup_low,
        measured_high=timing.speedup_high,
        p50_ms=timing.p50_ms,
        p99_ms=timing.latency.p99_ms,
        throughput_per_second=timing.throughput_per_second,
        peak_memory_bytes=timing.peak_memory_bytes,
        size_bytes=facts.size_bytes,
        over_torch=over_torch(record, timing.name),
        accuracy=facts.scores,
    )


def over_torch(record: BenchmarkRecord, name: str) -> Ratio | None:
    """Speedup of a file over the dense model in torch; None for that itself, or where it was not measured."""
    if name == TORCH or TORCH not in {timing.name for timing in record.variants}:
        return None
    return record.ratio_between(name, TORCH)
