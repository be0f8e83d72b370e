"""Which files of a member are recommended, on which engine, and beside what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.reports import FinishedRun, benchmark_record, finished_run, int8_record, variant
from ziplm_deploy.compression.records import facts_of, int8_note, spared_from_int8
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.engines.trial import RefusedFiles
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.recipe import Variant
from ziplm_deploy.reporting.records import FileReport
from ziplm_deploy.reporting.table import file_header, file_rows

DEEPSPARSE = {
    "environment": {"engine": "deepsparse"},
    "benchmark": {"baseline_engine": "onnxruntime"},
    "export": {"shapes": "static", "opset": 16},
}
INT8 = {"variants": ["int8"], "int8": {"method": "static"}}
NAMES = ("dense", "2x", "4x")
SCORES = {f"{name}{ending}": 0.865 for name in NAMES for ending in ("", " int8", " sparse", " sparse-int8")}


def record_on_two_engines(as_served: float | None, **speedups: float) -> BenchmarkRecord:
    """Dense on ONNX Runtime, the rest on DeepSparse; ``as_served``: dense there, too."""
    record = benchmark_record(**speedups)
    dense, *others = record.variants
    extra = [] if as_served is None else [variant("dense (deepsparse)", as_served)]
    served = [result.model_copy(update={"engine": "deepsparse"}) for result in [*extra, *others]]
    return record.model_copy(update={"engine": "deepsparse", "variants": [dense, *served]})


def int8_run(folder: Path, record: BenchmarkRecord, **settings: Any) -> FinishedRun:
    run = finished_run(folder, record, SCORES, **{"compress": INT8, **settings})
    for name in NAMES:
        int8_record().save(run.member(name).file(Variant("int8")).int8_record)
    return run


def verdicts(reports: list[FileReport]) -> list[tuple[str, str, bool]]:
    return [(report.file, report.engine, report.recommended) for report in reports]


@pytest.mark.parametrize(("as_served", "recommended"), [(0.5, True), (1.5, False), (1.195, False)])
def test_dense_int8_is_compared_with_dense_on_its_own_engine(
    tmp_path: Path, as_served: float, recommended: bool
) -> None:
    record = record_on_two_engines(as_served, **{"dense int8": 1.2})
    reports = int8_run(tmp_path, record, **DEEPSPARSE).files("dense")
    assert verdicts(reports) == [
        ("model.onnx", "onnxruntime", True),
        ("model.onnx", "deepsparse", True),
        ("model_int8.onnx", "deepsparse", recommended),
    ]
    assert reports[1].measured_speedup == as_served
    assert reports[0].accuracy == {"spearman": 0.865}
    assert reports[1].accuracy == {}  # dense was scored on the baseline's engine


def test_a_slower_engine_does_not_hide_that_int8_helps_on_it(tmp_path: Path) -> None:
    record = record_on_two_engines(0.5, **{"dense int8": 0.9})
    dense_int8 = int8_run(tmp_path, record, **DEEPSPARSE).files("dense")[-1]
    assert (dense_int8.measured_speedup, dense_int8.recommended) == (0.9, True)


def test_where_the_engine_refuses_dense_nothing_is_compared_with_another_engine(tmp_path: Path) -> None:
    record = record_on_two_engines(None, **{"dense int8": 0.9})
    run = int8_run(tmp_path, record, **DEEPSPARSE)
    refused = run.folder.refused_files
    RefusedFiles(files={"dense (deepsparse)": "assertion failed"}).save(refused)
    assert verdicts(run.files("dense")) == [
        ("model.onnx", "onnxruntime", True),
        ("model_int8.onnx", "deepsparse", True),
    ]


def test_a_benchmark_without_dense_where_members_serve_is_refused(tmp_path: Path) -> None:
    record = record_on_two_engines(None, **{"dense int8": 0.9})
    with pytest.raises(CorruptArtifactError, match=r"timing of dense \(deepsparse\).*benchmark again"):
        int8_run(tmp_path, record, **DEEPSPARSE).files("dense")


def test_members_have_one_row_a_file_and_rows_say_the_engine_where_there_are_two(tmp_path: Path) -> None:
    timed = {"2x": 2.0, "4x": 4.0, "dense int8": 1.2, "2x int8": 2.5, "4x int8": 4.5}
    report = int8_run(tmp_path, record_on_two_engines(0.9, **timed), **DEEPSPARSE).report()
    assert (report.baseline_engine, report.baseline_engine_version, report.engine) == (
        "onnxruntime",
        "1.0",
        "deepsparse",
    )
    titles, cells = file_header(report.members, "spearman"), file_rows(report.members, "spearman")
    assert {len(row) for row in cells} == {len(titles)}
    engine, measured = titles.index("engine"), titles.index("measured [95 %]")
    assert [(row[0], row[1], row[engine]) for row in cells[:4]] == [
        ("dense", "model.onnx", "onnxruntime"),
        ("dense", "model.onnx", "deepsparse"),
        ("dense", "model_int8.onnx", "deepsparse"),
        ("2x", "model.onnx", "deepsparse"),
    ]
    assert len(cells) == 7
    assert [row[measured] for row in cells[:2]] == ["1x", "0.90x [0.89, 0.91]"]
    assert "engine" not in file_header(report.members[1:], "spearman")
    assert {len(row) for row in file_rows(report.members[1:], "spearman")} == {len(titles) - 1}


@pytest.mark.parametrize("order", [["sparse-int8", "int8", "sparse"], ["int8", "sparse", "sparse-int8"]])
def test_recommendations_do_not_depend_on_the_order_of_variants(tmp_path: Path, order: list[str]) -> None:
    record = benchmark_record(**{"2x": 2.0, "2x int8": 3.0, "2x sparse": 2.2, "2x sparse-int8": 2.8})
    run = int8_run(tmp_path, record, compress={"variants": order})
    SparsityRecord(
        sparsity=0.8,
        pattern="unstructured",
        distribution="uniform",
        passes=1,
        relative_damping=0.01,
        n_tokens=99,
        linears=[],
    ).save(run.member("2x").sparsity_record)
    int8_record().save(run.member("2x").file(Variant("sparse-int8")).int8_record)
    reports = run.files("2x")
    assert verdicts(reports) == [
        ("model.onnx", "onnxruntime", True),
        ("model_int8.onnx", "onnxruntime", True),
        ("model_sparse.onnx", "onnxruntime", True),
        ("model_sparse_int8.onnx", "onnxruntime", False),
    ]
    assert reports[-1].reason.startswith("slower than model_int8.onnx")


def test_a_file_outside_the_accuracy_budget_is_not_recommended_however_fast(tmp_path: Path) -> None:
    timed = {"2x": 1.5, "4x": 2.0, "dense int8": 1.5, "2x int8": 2.0, "4x int8": 4.0}
    run = int8_run(tmp_path, benchmark_record(**timed), compress={**INT8, "target": "int8"})
    lost = int8_record(within_budget=False, scores=[0.7, 0.712, 0.71], fp32_linears=["a"])
    lost.save(run.member("2x").file(Variant("int8")).int8_record)
    _, lossy, good = run.report().members
    assert lossy.verdict == "reached"
    assert lossy.reason == ""
    assert [each.recommended for each in lossy.files] == [True, False]
    assert lossy.files[1].reason == "outside the accuracy budget (0.7120 against 0.8700)"
    assert [each.recommended for each in good.files] == [True, True]


@pytest.mark.parametrize(
    ("low", "aa", "reason"),
    [
        (1.4, 0.0, ""),
        (0.99, 0.0, "not faster than the dense model beyond noise (1.50x)"),
        (1.4, 0.2, "the baseline against itself is up to 20.00 % from 1"),
    ],
)
def test_a_pruned_file_is_recommended_only_where_it_is_faster_beyond_noise(
    tmp_path: Path, low: float, aa: float, reason: str
) -> None:
    record = benchmark_record(**{"2x": 1.5, "4x": 2.0})
    record.variant("2x").__dict__.update(speedup_low=low)
    record.__dict__.update(aa_low=1 - aa, aa_high=1 + aa)
    run = finished_run(tmp_path, record, SCORES)
    dense, found, _ = run.report().members
    assert (dense.files[0].recommended, found.files[0].recommended) == (True, not reason)
    assert found.files[0].reason.startswith(reason)


def test_the_budget_holds_where_the_file_serves_too(tmp_path: Path) -> None:
    record = benchmark_record(**{"2x": 2.0, "2x int8": 2.5})
    run = int8_run(tmp_path, record, compress={**INT8, "int8": {"max_loss": 0.02}})
    int8_record(reference_score=0.9, scores=[0.895]).save(run.member("2x").file(Variant("int8")).int8_record)
    accuracy = run.member("2x").file(Variant.INT8).scores
    accuracy.write_text('{"spearman": 0.883}', encoding="utf-8")
    assert run.files("2x")[1].recommended
    accuracy.write_text('{"spearman": 0.881}', encoding="utf-8")
    served = run.files("2x")[1]
    assert not served.recommended
    assert served.reason == "outside the accuracy budget on the engine that serves (0.8810 against 0.9000)"


def test_looks_at_the_examples_that_chose_are_counted(tmp_path: Path) -> None:
    run = int8_run(tmp_path, benchmark_record(**{"2x": 2.0, "2x int8": 2.5}))
    file = run.member("2x").file(Variant.INT8)
    judged = {"n_choosing": 101, "whole_score": 0.85, "whole_reference_score": 0.88}
    int8_record(**judged, scores=[0.8, 0.865]).save(file.int8_record)
    # The half that chose was lucky. The same engine gives the same answers: what they are worth, intervals tell.
    file.scores.write_text('{"spearman": 0.85}', encoding="utf-8")
    found = run.files("2x")[1]
    assert found.facts["chosen by"] == "2 looks at 101 examples"
    assert found.reason == ""
    file.scores.write_text('{"spearman": 0.84}', encoding="utf-8")
    assert run.files("2x")[1].reason == (
        "outside the accuracy budget on the engine that serves (0.8400 against 0.8800)"
    )


def test_a_target_missed_after_the_closed_loop_says_that_it_was_reached_there(tmp_path: Path) -> None:
    timed = {"2x": 1.5, "4x": 2.0, "dense int8": 1.5, "2x int8": 1.8, "4x int8": 3.0}
    run = int8_run(tmp_path, benchmark_record(**timed), compress={**INT8, "target": "int8"})
    benchmark_record(**{"2x": 2.01, "4x": 3.0}).save(run.folder.generation_benchmark("dense"))
    _, reached, never = run.report().members
    assert reached.reason.startswith("it was fast enough (2.01x) when the closed loop measured it")
    assert "levels are too far apart" in never.reason


def test_notes_name_the_linears_that_they_are_about() -> None:
    outliers = {"ruined_by_outliers": ["c", "d"]}
    assert int8_note("2x int8", int8_record(), 0.01) == int8_note("2x int8", int8_record(**outliers), 0.01) == ""
    kept = int8_note("2x int8", int8_record(fp32_linears=["a", "b"]), 0.01)
    assert kept == "2x int8: stayed float32 to hold the accuracy budget: a, b"
    eight = {"a": 8, "b": 8, "c": 4}  # four bits are asked for, not spared
    spared = int8_note("2x int8", int8_record(weight_only=eight), 0.01)
    assert spared == "2x int8: became weight-only 8-bit to hold the accuracy budget: a, b"
    lost = int8_note("2x int8", int8_record(weight_only=eight, within_budget=False), 0.01)
    assert "with 2 of 12 linears in weight-only 8-bit form: a, b; most sensitive" in lost
    assert facts_of(None, int8_record(weight_only=eight)) == {
        "INT8": "static, 8-bit weights",
        "weight-only 8-bit": "2 of 12 linears",
        "weight-only 4-bit": "1 of 12 linears",
    }
    assert spared_from_int8(int8_record(weight_only=eight)).startswith(
        "2 of 12 linears became weight-only 8-bit to hold"
    )
    assert spared_from_int8(int8_record(weight_only={"c": 4})) == ""
    unjudged = int8_record(**outliers, reference_score=None, scores=[], within_budget=None)
    assert "outliers ruin c, d, and nothing judged its accuracy" in int8_note("2x int8", unjudged, 0.01)
    lost = int8_record(**outliers, scores=[0.7, 0.71], fp32_linears=["a"], within_budget=False)
    note = int8_note("2x int8", lost, 0.01)
    assert "0.7100 is outside the accuracy budget (max_loss 0.01 of 0.8700), the best of 2 tried" in note
    assert "with 1 of 12 linears in float32: a; outliers ruin c, d; try int8.method qat, a larger" in note
    assert "ruin c, d; try a larger max_fp32_share" in int8_note("2x int8", lost, 0.01, may_train=False)
    assert int8_note("2x int8", unjudged, 0.01, may_train=False).endswith("; give data.evaluation")


@pytest.mark.parametrize("within_budget", [True, None])
def test_a_budget_that_holds_or_was_never_set_rules_nothing_out(tmp_path: Path, within_budget: bool | None) -> None:
    record = benchmark_record(**{"2x": 2.0, "2x int8": 2.5})
    run = int8_run(tmp_path, record)
    int8_record(within_budget=within_budget, scores=[], reference_score=None).save(
        run.member("2x").file(Variant("int8")).int8_record
    )
    assert [each.recommended for each in run.files("2x")] == [True, True]


def test_a_target_missed_because_linears_stayed_float32_says_so(tmp_path: Path) -> None:
    timed = {"2x": 1.5, "4x": 2.0, "dense int8": 1.5, "2x int8": 1.8, "4x int8": 3.0}
    run = int8_run(tmp_path, benchmark_record(**timed), compress={**INT8, "target": "int8"})
    int8_record(fp32_linears=["a", "b"], scores=[0.7, 0.8, 0.865]).save(
        run.member("2x").file(Variant("int8")).int8_record
    )
    _, kept, throughout = run.report().members
    assert kept.verdict == throughout.verdict == "missed"
    assert kept.reason.startswith("2 of 12 linears stayed float32 to hold the accuracy budget")
    assert "linears" not in throughout.reason
