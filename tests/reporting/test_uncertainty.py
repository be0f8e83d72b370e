"""Scores with their intervals in reports: what is shown, and what is decided by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.reports import (
    FinishedRun,
    benchmark_record,
    family_report,
    file,
    finished_run,
    int8_record,
    member,
)
from ziplm_deploy.recipe import RecoverConfig, Variant
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.judge import harmed_by_training, judged_apart, nothing_to_keep, taught_more_than_dense
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.reporting.table import file_header, file_rows, header, rows
from ziplm_deploy.tasks.record import Scores
from ziplm_deploy.tasks.resampling import Comparison
from ziplm_deploy.tasks.uncertainty import FileUncertainty, Uncertainty

INT8 = {"compress": {"variants": ["int8"]}}


def comparison(difference: float, half_width: float, dense: float = 0.8) -> Comparison:
    low, high = difference - half_width, difference + half_width
    percent, percent_low, percent_high = (100 * (dense + each) / dense for each in (difference, low, high))
    return Comparison(
        difference=difference,
        low=low,
        high=high,
        percent=percent,
        percent_low=percent_low,
        percent_high=percent_high,
        n_examples=750,
    )


def compared(name: str, difference: float, half_width: float, **changes: Any) -> Any:
    """A member whose Spearman was compared with 0.8 of the dense model."""
    score = 0.8 + difference
    return member(
        name,
        accuracy={"spearman": score, "pearson": 0.8},
        accuracy_intervals={"spearman": (score - 0.02, score + 0.02)},
        of_dense={} if name == "dense" else {"spearman": comparison(difference, half_width)},
        **changes,
    )


def report_of_two() -> FamilyReport:
    return family_report(compared("dense", 0, 0), compared("2x", -0.008, 0.006))


def test_the_table_has_percent_of_dense_with_its_interval_beside_the_score() -> None:
    members = report_of_two().members
    titles = header(members, "spearman")
    cells = rows(members, "spearman")
    assert {len(row) for row in cells} == {len(titles)}
    score, of_dense = titles.index("spearman"), titles.index("of dense [95 %]")
    assert of_dense == score + 1
    assert [row[score] for row in cells] == ["0.8000", "0.7920"]
    assert [row[of_dense] for row in cells] == ["–", "99.0 % [98.2, 99.8]"]
    files = [each.model_copy(update={"files": [each.served]}) for each in members]
    place = file_header(files, "spearman").index("of dense [95 %]")
    assert [row[place] for row in file_rows(files, "spearman")] == ["–", "99.0 % [98.2, 99.8]"]
    assert {len(row) for row in file_rows(files, "spearman")} == {len(file_header(files, "spearman"))}


def test_reports_from_before_intervals_look_as_they_did() -> None:
    members = [member("dense"), member("2x")]
    assert "spearman" in header(members, "spearman")
    assert "of dense [95 %]" not in header(members, "spearman")
    assert {len(row) for row in rows(members, "spearman")} == {len(header(members, "spearman"))}
    text = family_markdown(family_report(*members))
    assert "bootstrap" not in text


def test_document_and_card_show_the_difference_to_dense() -> None:
    report = report_of_two()
    text = family_markdown(report)
    assert "Scores are on 750 examples" in text
    assert "| 2x | -0.0080 [-0.0140, -0.0020] |" in text
    card = model_card(report, report.members[1], "ORTModelForFeatureExtraction")
    assert "| spearman | 0.7920 [0.7720, 0.8120] | 0.8000 [0.7800, 0.8200] |" in card
    assert "| spearman, of dense | 99.0 % [98.2, 99.8]; -0.0080 [-0.0140, -0.0020] | – |" in card


def test_what_the_search_measured_is_the_distance_to_the_model_that_is_pruned() -> None:
    assert "Distance to the dense model on calibration" in family_markdown(report_of_two())
    gradual = family_report(compared("dense", 0, 0), compared("2x", -0.008, 0.006), recovery="gradual")
    assert "Distance to the model that is pruned (dense for the first member, the trained one" in family_markdown(
        gradual
    )


@pytest.mark.parametrize(("half_width", "named"), [(0.01, True), (0.06, False)])
def test_training_harmed_a_member_only_beyond_noise(half_width: float, named: bool) -> None:
    worse = member(
        "2x",
        accuracy={"spearman": 0.8},
        accuracy_before_training={"spearman": 0.85},
        training_effect=comparison(-0.05, half_width),
    )
    assert bool(harmed_by_training([worse], "spearman")) == named


@pytest.mark.parametrize(
    ("recover", "named"),
    [
        ({}, []),
        ({"mode": "gradual"}, []),
        ({"task_weight": 0.5}, []),  # but nothing is trained
        ({"mode": "one-shot", "task_weight": 0.5}, ["labels (recover.task_weight), the dense"]),
        (
            {"mode": "gradual", "teacher": "a/b", "task_weight": 1.0},
            ["labels (recover.task_weight) and another teacher"],
        ),
    ],
)
def test_members_that_learned_more_than_the_dense_model_are_noted(recover: dict[str, Any], named: list[str]) -> None:
    notes = taught_more_than_dense(RecoverConfig.model_validate(recover), has_control=False)
    assert all(note.endswith("for a fair comparison add dense-trained-on to benchmark.baselines") for note in notes)
    assert [any(name in note for note in notes) for name in named] == [True] * len(notes)
    assert len(notes) == len(named)


def int8_run(tmp_path: Path, percent_low: float, percent_high: float, **settings: Any) -> FinishedRun:
    """The 2x INT8 file keeps 98.5 % of its float32 score, somewhere between these; 99 % is asked."""
    scores = {"dense": 0.9, "2x": 0.8, "4x": 0.8, "dense int8": 0.9, "2x int8": 0.788, "4x int8": 0.8}
    record = benchmark_record(**{"2x": 2.0, "4x": 4.0, "dense int8": 1.5, "2x int8": 2.5, "4x int8": 4.5})
    run = finished_run(tmp_path, record, scores, **INT8, **settings)
    for each in run.members:
        int8_record(reference_score=0.8, scores=[0.796]).save(each.file(Variant.INT8).int8_record)
    kept = comparison(-0.012, 0.0).model_copy(update={"percent_low": percent_low, "percent_high": percent_high})
    scored = run.member("2x").file(Variant.INT8)
    Scores.load(scored.scores).model_copy(update={"outcomes_hash": "a"}).save(scored.scores)
    entry = FileUncertainty(outcomes_hash="a", intervals={"spearman": (0.77, 0.81)}, of_source=kept)
    Uncertainty(n_resamples=2000, files={"2x int8": entry}, training={}).save(run.folder.uncertainty)
    return run


@pytest.mark.parametrize(
    ("low", "high", "budget", "recommended", "noted"),
    [(99.1, 100.2, "met", True, False), (97.0, 98.9, "missed", False, False), (97.9, 99.2, "undecided", False, True)],
)
def test_the_accuracy_budget_is_met_missed_or_undecided(
    tmp_path: Path, low: float, high: float, budget: str, recommended: bool, noted: bool
) -> None:
    run = int8_run(tmp_path, low, high)
    report = run.report()
    float32, int8 = report.members[1].files
    assert (float32.budget, float32.recommended) == (None, True)
    assert (int8.budget, int8.recommended) == (budget, recommended)
    assert int8.accuracy_intervals == {"spearman": (0.77, 0.81)}
    if budget != "met":
        where = "outside" if budget == "missed" else "undecided whether it holds"
        assert int8.reason == (
            f"{where} the accuracy budget: 98.5 % [{low}, {high}] of the float32 score on 750 examples, where 99 % is "
            "asked"
        )
    assert (
        any(note.startswith("2x int8: whether it holds the accuracy budget is undecided") for note in report.notes)
        is noted
    )


def test_a_budget_that_the_other_half_holds_is_held_though_the_choosing_half_did_not(tmp_path: Path) -> None:
    run = int8_run(tmp_path, 99.1, 100.2)
    lost = int8_record(reference_score=0.8, scores=[0.7, 0.78], within_budget=False, n_choosing=750)
    lost.save(run.member("2x").file(Variant.INT8).int8_record)
    report = run.report()
    found = report.members[1].files[1]
    assert (found.budget, found.recommended, found.reason) == ("met", True, "")
    assert found.facts["budget"] == "not held on the 750 examples that chose"
    assert any("2x int8: 0.7800 on the 750 examples that chose is outside" in note for note in report.notes)


def test_files_compared_on_the_examples_that_did_not_choose_are_noted() -> None:
    whole, half = (comparison(-0.01, 0.02).model_copy(update={"n_examples": n}) for n in (1500, 750))
    one, other = member("2x"), member("4x")
    one.files = [file(Variant.FP32, of_dense={"spearman": whole}), file(Variant.INT8, of_dense={"spearman": half})]
    other.files = [file(Variant.FP32, of_dense={"spearman": whole})]
    (note,) = judged_apart([one, other], "spearman")
    assert "on the 750 evaluation examples that did not choose; their scores are of all 1500" in note
    assert judged_apart([other], "spearman") == []
    assert judged_apart([member("dense")], "spearman") == []


def test_intervals_of_other_outcomes_than_those_scored_are_left_out(tmp_path: Path) -> None:
    run = int8_run(tmp_path, 97.0, 98.9)
    scored = run.member("2x").file(Variant.INT8)
    Scores.load(scored.scores).model_copy(update={"outcomes_hash": "b"}).save(scored.scores)
    found = run.files("2x")[1]
    assert (found.accuracy_intervals, found.budget, found.of_source) == ({}, None, None)


def test_a_report_keeps_its_intervals_on_the_disk(tmp_path: Path) -> None:
    report = report_of_two()
    report.members[1].files = [file(Variant.INT8, budget="undecided", of_source=comparison(-0.01, 0.02))]
    report.save(tmp_path / "report.json")
    assert FamilyReport.load(tmp_path / "report.json") == report


@pytest.mark.parametrize(("score", "named"), [(0.0, True), (0.01, False), (-0.4, False), (None, False)])
def test_a_dense_model_that_finds_nothing_is_named(score: float | None, named: bool) -> None:
    dense = member("dense", accuracy={} if score is None else {"micro_f1": score})
    pruned = member("2x", accuracy={"micro_f1": 0.0})
    assert bool(nothing_to_keep([dense, pruned], "micro_f1")) == named
    assert nothing_to_keep([], "micro_f1") == []
