"""What users get without pruning stands beside the members, in every form of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.helpers.reports import FinishedRun, benchmark_record, family_report, finished_run, member, variant
from ziplm_deploy.baselines import BaselineRecord
from ziplm_deploy.cli import console
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.models.architectures import ARCHITECTURES
from ziplm_deploy.reporting import collect
from ziplm_deploy.reporting.baselines import standing
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.facts import BaselineFacts, FamilyFacts
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import BaselineReport, FamilyReport
from ziplm_deploy.reporting.table import baseline_lines, baseline_rows, header, rows, verdict
from ziplm_deploy.stages import report as report_stage
from ziplm_deploy.tasks.resampling import Comparison


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
    compared = family_report(baselines=[baseline("int8", of_dense={"spearman": comparison(-0.02, -0.01)})])
    compared.members[1].served.of_dense = {"spearman": comparison(-0.03, -0.01)}
    assert "101.0 % [100.5, 101.5]" in baseline_rows(compared.members, compared.baselines, compared.metric)[0]
    for report in (plain, compared, with_torch(baseline("int8", over_torch=Ratio(3.7, 3.6, 3.8)), baseline("torch"))):
        titles = header(report.members, report.metric)
        everything = [
            *rows(report.members, report.metric),
            *baseline_rows(report.members, report.baselines, report.metric),
        ]
        assert {len(row) for row in everything} == {len(titles)}
        assert ("over torch" in titles) == (report not in (plain, compared))


def test_speedups_over_torch_stand_beside_those_over_dense() -> None:
    report = with_torch(baseline("int8", over_torch=Ratio(3.7, 3.6, 3.8)), baseline("torch", measured_speedup=0.66))
    column = header(report.members, report.metric).index("over torch")
    assert [row[column] for row in rows(report.members, report.metric)] == ["1.50x [1.40, 1.60]", "3.00x [2.90, 3.10]"]
    assert [row[column] for row in baseline_rows(report.members, report.baselines, report.metric)] == [
        "3.70x [3.60, 3.80]",
        "–",
    ]


def test_every_report_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    report = with_torch(baseline("int8"))
    console.print_family(report, Path("runs/demo"))
    printed = capsys.readouterr().out
    assert "int8" in printed
    assert "2.50x [2.40, 2.60]" in printed
    text = family_markdown(report)
    assert "its \\| defaults" in text.partition("## Baselines")[2]
    card = model_card(report, report.members[1], "ORTModelForFeatureExtraction")
    assert "| stock int8 | 2.500x | 2.400 to 2.600 | 0.8610 | – | a tool 1.0: its \\| defaults |" in card


def test_a_card_names_no_loader_that_lacks_the_type() -> None:
    report = family_report(task="sentence-similarity")
    known = model_card(report, report.members[1], "ORTModelForFeatureExtraction")
    assert "from optimum.onnxruntime import ORTModelForFeatureExtraction" in known
    assert "from sentence_transformers import SentenceTransformer" in known
    unknown = model_card(report, report.members[1], None)
    assert "from optimum" not in unknown
    assert "from sentence_transformers" not in unknown
    assert 'onnxruntime.InferenceSession("2x/model.onnx")' in unknown


@pytest.mark.parametrize(
    ("model_type", "expected"), [("bert", "ORTModelForFeatureExtraction"), ("eurobert", None), (None, True)]
)
def test_optimum_is_asked_for_the_types_that_it_has(tmp_path: Path, model_type: str | None, expected: Any) -> None:
    run = finished_run(tmp_path, benchmark_record(**{"2x": 2.0, "4x": 4.0}), dict.fromkeys(("dense", "2x", "4x"), 0.8))
    if model_type is not None:
        (run.dense_member.folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    found = report_stage.ort_class_of(run)  # type: ignore[arg-type]
    if model_type == "eurobert" and model_type not in ARCHITECTURES:
        pytest.skip("transformers 4 has no such type")
    assert found == (run.task.ort_class if expected else None)


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
    record.baseline = next(iter(latencies))
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


def test_a_file_with_fewer_processes_is_compared_within_those() -> None:
    slow = np.repeat([2.0, 2.0, 9.0], 4)[:, None] * np.ones((12, 3))
    record = timed([4, 4, 4], fast=np.ones((12, 3)), slow=slow, brief=4.0 * np.ones((8, 3)))
    ratio = record.ratio_between("slow", "brief")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert record.ratio_between("brief", "slow").value == pytest.approx(0.5)


@pytest.mark.parametrize("rounds", [[], [4, 4], [5, 5, 5]])
def test_samples_of_unknown_rounds_are_refused(rounds: list[int]) -> None:
    record = timed(rounds, fast=np.ones((12, 3)), slow=np.ones((12, 1)))
    with pytest.raises(CorruptArtifactError, match="run ziplm-deploy benchmark again"):
        record.ratio_between("fast", "slow")
    with pytest.raises(CorruptArtifactError, match="expected samples of fast and none"):
        timed([6, 6], fast=np.ones((12, 3))).ratio_between("fast", "none")


NARROW = 0.05


@pytest.mark.parametrize(
    ("baseline_speedup", "gain", "expected"),
    [
        (2.5, (0.001, 0.01), "beaten"),
        (1.5, (0.001, 0.01), "ahead"),  # slower
        (2.5, (-0.01, -0.001), "ahead"),  # scores lower
        (2.5, (-0.001, 0.01), "undecided"),  # scores are not told apart
        (2.05, (0.001, 0.01), "undecided"),  # latencies are not told apart
        (2.05, (-0.001, 0.001), "undecided"),
        (2.05, (-0.01, -0.001), "ahead"),
    ],
)
def test_a_file_is_beaten_only_beyond_both_intervals(
    baseline_speedup: float, gain: tuple[float, float], expected: str
) -> None:
    own = Ratio(2.0, 2.0 - NARROW, 2.0 + NARROW)
    other = Ratio(baseline_speedup, baseline_speedup - NARROW, baseline_speedup + NARROW)
    assert standing(own, other, comparison(*gain)) == expected
    assert standing(own, other, comparison(*gain), noise="the machine was busy") == "undecided"


def comparison(low: float, high: float) -> Comparison:
    """The baseline's score less another's."""
    return Comparison(
        difference=(low + high) / 2,
        low=low,
        high=high,
        percent=101.0,
        percent_low=100.5,
        percent_high=101.5,
        n_examples=9,
    )


def judged(tmp_path: Path, gain: tuple[float, float] | None, aa_high: float = 1.006) -> FamilyReport:
    """A run of 2x and 4x beside a baseline of 3x; ``gain``: of the baseline over every member."""
    record = benchmark_record(**{"2x": 2.01, "4x": 4.01, "int8": 3.0}).model_copy(update={"aa_high": aa_high})
    run = finished_run(tmp_path, record, {"dense": 0.87, "2x": 0.86, "4x": 0.8})
    facts = family_facts_of(run)
    made_by = BaselineRecord(tool="a tool 1.0", settings="its defaults")
    rival = BaselineFacts("int8", "stock INT8", made_by, 100, record.variant("int8"), {"spearman": 0.865})
    gains = {} if gain is None else {"int8": comparison(*gain)}
    members = [
        replace(each, files=[replace(file, baseline_gains=gains if each.target else {}) for file in each.files])
        for each in facts.members
    ]
    return collect.family_report(replace(facts, members=members, baselines=[rival]))


def family_facts_of(run: FinishedRun) -> FamilyFacts:
    with mock.patch.object(report_stage, "member_key", return_value="key"):
        return report_stage.family_facts(run)  # type: ignore[arg-type]


def test_a_member_that_is_beaten_is_said_to_be_and_not_recommended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = judged(tmp_path, (0.001, 0.01))
    dense, slow, fast = report.members
    assert (slow.served.beaten_by, slow.served.undecided_against) == (["int8"], [])
    assert (slow.served.recommended, slow.served.reason) == (False, "beaten by int8")
    assert fast.served.recommended  # four times as fast: nobody else is
    assert dense.served.recommended
    assert verdict(slow) == "reached; beaten by int8"
    assert verdict(fast) == "reached"
    line = "2x: int8 is faster and scores higher, both beyond the intervals: use it instead (3.00x ["
    console.print_family(report, Path("runs/demo"))
    assert line in capsys.readouterr().out
    assert f"- {line}" in family_markdown(report)
    assert "This model is beaten by int8" in model_card(report, slow, "ORTModelForFeatureExtraction")
    assert "This model is" not in model_card(report, fast, "ORTModelForFeatureExtraction")


def test_what_is_not_told_apart_is_undecided_and_not_recommended(tmp_path: Path) -> None:
    slow = judged(tmp_path, (-0.001, 0.01)).members[1]
    assert (slow.served.beaten_by, slow.served.undecided_against) == ([], ["int8"])
    assert (slow.served.recommended, slow.served.reason) == (False, "undecided against int8")


def test_a_noisy_benchmark_decides_nothing(tmp_path: Path) -> None:
    report = judged(tmp_path, (0.001, 0.01), aa_high=1.5)
    assert [member.served.undecided_against for member in report.members] == [[], ["int8"], ["int8"]]
    assert not any(member.served.beaten_by for member in report.members)
    lines = baseline_lines(report)
    assert lines == [
        f"{name}: timings are too noisy to say whether it is ahead of int8"
        for name in (member.name for member in report.members[1:])
    ]


def test_without_scores_nothing_is_said(tmp_path: Path) -> None:
    for member_report in judged(tmp_path, None).members:
        assert (member_report.served.beaten_by, member_report.served.undecided_against) == ([], [])
        assert member_report.served.recommended
