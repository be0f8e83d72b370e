"""What users get without pruning stands beside the members, in every form of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.reports import benchmark_record, family_report, member, variant
from ziplm_deploy.cli import console
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import BaselineReport, FamilyReport
from ziplm_deploy.reporting.table import baseline_rows, header, rows


def baseline(name: str, **changes: Any) -> BaselineReport:
    fields: dict[str, Any] = {
        "name": name,
        "title": f"stock {name}",
        "tool": "a tool 1.0",
        "settings": "its | defaults",
        "engine": "onnxruntime",
        "engine_version": "1.0",
        "measured_speedup": 2.5,
        "measured_low": 2.4,
        "measured_high": 2.6,
        "p50_ms": 4.0,
        "p99_ms": 5.0,
        "throughput_per_second": 250.0,
        "peak_memory_bytes": 2**20,
        "size_bytes": 23_000_000,
        "accuracy": {"spearman": 0.861, "pearson": 0.85, "mean_cosine": 0.98},
    }
    return BaselineReport(**{**fields, **changes})


def with_torch(*baselines: BaselineReport) -> FamilyReport:
    report = family_report(member("dense"), member("2x"), baselines=list(baselines))
    for each, value in zip(report.members, (1.5, 3.0), strict=True):
        each.served.over_torch = Ratio(value, value - 0.1, value + 0.1)
    return report


def test_rows_are_as_long_as_the_titles() -> None:
    plain = family_report(baselines=[baseline("int8")])
    for report in (plain, with_torch(baseline("int8", over_torch=Ratio(3.7, 3.6, 3.8)), baseline("torch"))):
        titles = header(report.members, report.metric)
        everything = [*rows(report.members, report.metric), *baseline_rows(report)]
        assert {len(row) for row in everything} == {len(titles)}
        assert ("over torch" in titles) == (report is not plain)


def test_speedups_over_torch_stand_beside_those_over_dense() -> None:
    report = with_torch(baseline("int8", over_torch=Ratio(3.7, 3.6, 3.8)), baseline("torch", measured_speedup=0.66))
    column = header(report.members, report.metric).index("over torch")
    assert [row[column] for row in rows(report.members, report.metric)] == ["1.50x [1.40, 1.60]", "3.00x [2.90, 3.10]"]
    assert [row[column] for row in baseline_rows(report)] == ["3.70x [3.60, 3.80]", "–"]


def test_every_report_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    report = with_torch(baseline("int8"))
    console.print_family(report, Path("runs/demo"))
    printed = capsys.readouterr().out
    assert "int8" in printed
    assert "2.50x [2.40, 2.60]" in printed
    text = family_markdown(report)
    assert "its \\| defaults" in text.partition("## Baselines")[2]
    card = model_card(report, report.members[1], "ORTModelForFeatureExtraction")
    assert "| stock int8 | 2.500x | 2.400 to 2.600 | 0.8610 | a tool 1.0: its \\| defaults |" in card


def test_reports_from_before_there_were_any_are_read(tmp_path: Path) -> None:
    report = family_report()
    report.save(tmp_path / "report.json")
    assert FamilyReport.load(tmp_path / "report.json").baselines == []
    assert "Baselines" not in family_markdown(report)
    assert "Without pruning" not in model_card(report, report.members[1], "ORTModelForFeatureExtraction")


def timed(rounds: list[int], **latencies: np.ndarray) -> BenchmarkRecord:
    """A record with these latencies [rounds, runs] of each file."""
    record = benchmark_record()
    record.rounds_of_processes = rounds
    record.variants = [
        variant(name, 1.0).model_copy(update={"samples_ms": ms.ravel().tolist()}) for name, ms in latencies.items()
    ]
    return record


def test_a_ratio_of_two_files_is_that_of_their_rounds() -> None:
    drift = np.linspace(1.0, 3.0, 12)[:, None]  # the machine gets slower: it cancels within a round
    one = 2.0 * drift * np.ones((12, 3))
    record = timed([4, 4, 4], fast=one, slow=5.0 * drift * np.ones((12, 3)))
    ratio = record.ratio_between("fast", "slow")
    assert ratio.value == pytest.approx(2.5)
    assert ratio.high - ratio.low < 1e-9
    # by hand: one value a process, t of two degrees of freedom 4.3027
    shift = np.repeat([1.0, 1.1, 1.21], 4)[:, None]
    ratio = timed([4, 4, 4], fast=one, slow=one * shift).ratio_between("fast", "slow")
    half = 4.30265 * np.log(1.1) / np.sqrt(3)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (1.1, 1.1 * np.exp(-half), 1.1 * np.exp(half)), rel=1e-5
    )


@pytest.mark.parametrize("rounds", [[], [4, 4], [5, 5, 5]])
def test_samples_of_unknown_rounds_are_refused(rounds: list[int]) -> None:
    record = timed(rounds, fast=np.ones((12, 3)), slow=np.ones((12, 1)))
    with pytest.raises(CorruptArtifactError, match="run ziplm-deploy benchmark again"):
        record.ratio_between("fast", "slow")
    with pytest.raises(CorruptArtifactError, match="expected samples of fast and none"):
        timed([6, 6], fast=np.ones((12, 3))).ratio_between("fast", "none")
