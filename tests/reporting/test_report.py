"""Reports: verdicts, tables, model cards, and the published schema."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tests.helpers.reports import (
    FinishedRun,
    benchmark_record,
    family_report,
    file,
    finished_run,
    int8_record,
    latency_table,
    member,
    plan,
)
from ziplm_deploy.cli import console
from ziplm_deploy.compression.records import spared_from_int8
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import CorruptArtifactError, UsageError
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.recipe import BenchmarkConfig, Variant
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting import collect
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.judge import harmed_by_training, judge
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.reporting.schema import ARTIFACTS, json_schema
from ziplm_deploy.reporting.table import aa_line, header, markdown_table, rows, shows_no_speedup
from ziplm_deploy.run.manifest import Correction
from ziplm_deploy.stages import report as report_stage
from ziplm_deploy.tasks.resampling import Comparison

SETTINGS = BenchmarkConfig()  # tolerance 2 %, overshoot 10 %, 3 corrections
QUIET = Ratio(1.0, 0.997, 1.004)  # the baseline over itself


def around(speedup: float, half_width: float = 0.0005) -> Ratio:
    return Ratio(speedup, speedup * (1 - half_width), speedup * (1 + half_width))


@pytest.mark.parametrize(
    ("measured", "corrections", "verdict", "reason"),
    [
        (2.0, 0, "reached", ""),
        (1.961, 0, "reached", ""),
        (2.2, 0, "reached", ""),
        (1.95, 1, "missed", "no faster plan fits"),
        (1.95, 3, "missed", "all 3 corrections"),
        (2.21, 1, "faster than asked", "no slower plan fits"),
        (2.21, 3, "faster than asked", "all 3 corrections"),
    ],
)
def test_verdicts(measured: float, corrections: int, verdict: str, reason: str) -> None:
    found, why = judge(around(measured), QUIET, 2.0, SETTINGS, corrections, largest=4.0)
    assert found == verdict
    assert why.startswith(reason)
    assert bool(why) == bool(reason)


def test_open_intervals_and_noise_leave_a_verdict_undecided() -> None:
    verdict, reason = judge(around(1.99, 0.03), QUIET, 2.0, SETTINGS, 0, largest=4.0)
    assert verdict == "undecided"
    assert "holds the least speedup that counts as reached, 1.96x; measure again" in reason
    verdict, reason = judge(Ratio(2.61, 0.45, 4.71), Ratio(0.992, 0.265, 2.242), 1.5, SETTINGS, 0, largest=4.0)
    assert verdict == "undecided"
    assert "up to more than 100 % from 1, more than benchmark.tolerance (2 %)" in reason
    assert judge(around(2.0), Ratio(1.0, 0.979, 1.01), 2.0, SETTINGS, 0, largest=4.0)[0] == "undecided"


def test_linears_in_float32_are_the_reason_before_corrections_but_not_before_the_table() -> None:
    slowed_by = spared_from_int8(int8_record(fp32_linears=["a", "b", "c"]))
    for corrections in (0, 1, 3):
        verdict, reason = judge(around(1.9), QUIET, 2.0, SETTINGS, corrections, largest=4.0, slowed_by=slowed_by)
        assert verdict == "missed"
        assert reason.startswith("3 of 12 linears stayed float32 to hold the accuracy budget; raise")
        assert "compress.int8.max_loss or lower max_fp32_share" in reason
    assert "latency table" in judge(around(1.9), QUIET, 5.0, SETTINGS, 3, largest=4.0, slowed_by=slowed_by)[1]
    assert judge(around(2.0), QUIET, 2.0, SETTINGS, 3, largest=4.0, slowed_by=slowed_by) == ("reached", "")
    assert "3 corrections" in judge(around(2.3), QUIET, 2.0, SETTINGS, 3, largest=4.0, slowed_by=slowed_by)[1]
    assert spared_from_int8(int8_record()) == spared_from_int8(None) == ""


def test_a_member_that_training_made_worse_is_named() -> None:
    before = {"spearman": 0.85}
    worse = member("2x", accuracy={"spearman": 0.8}, accuracy_before_training=before, training_effect=effect(-0.05))
    better = member("3x", accuracy={"spearman": 0.86}, accuracy_before_training=before, training_effect=effect(0.01))
    same = member("1.5x", accuracy={"spearman": 0.85}, accuracy_before_training=before, training_effect=effect(-0.0))
    older = member("5x", accuracy={"spearman": 0.8}, accuracy_before_training=before)  # no outcomes were kept
    assert harmed_by_training([worse, better, same, older, member("4x", accuracy={})], "spearman") == [
        "2x: training lowered spearman from 0.8500 to 0.8000 (-0.0500 [-0.0600, -0.0400]); try a smaller "
        "recover.learning_rate, or more steps"
    ]


def effect(difference: float) -> Comparison:
    """What training did to a score, give or take 0.01."""
    return Comparison(
        difference=difference,
        low=difference - 0.01,
        high=difference + 0.01,
        percent=None,
        percent_low=None,
        percent_high=None,
        n_examples=99,
    )


def test_what_training_did_is_judged_by_one_file() -> None:
    before = {"spearman": 0.85}
    files = [file(Variant("fp32"), accuracy={"spearman": 0.86}), file(Variant("int8"), accuracy={"spearman": 0.7})]
    better = member("2x", variant="int8", files=files, accuracy={"spearman": 0.7}, accuracy_before_training=before)
    assert harmed_by_training([better], "spearman") == []
    files = [file(Variant("fp32"), accuracy={"spearman": 0.8}), file(Variant("int8"), accuracy={"spearman": 0.9})]
    worse = member(
        "2x",
        variant="int8",
        files=files,
        accuracy={"spearman": 0.9},
        accuracy_before_training=before,
        training_effect=effect(-0.05),
    )
    assert "from 0.8500 to 0.8000" in harmed_by_training([worse], "spearman")[0]
    only_int8 = member(
        "2x", variant="int8", files=files[1:], accuracy_before_training=before, training_effect=effect(-0.05)
    )
    assert harmed_by_training([only_int8], "spearman") == []


def test_a_score_before_training_stands_only_beside_that_of_the_same_file() -> None:
    before = {"spearman": 0.85}
    exported = member("2x", accuracy_before_training=before)
    assert "before training" in header([member("dense"), exported], "spearman")
    assert "0.8500" in rows([exported], "spearman")[0]
    assert "| spearman, before training | 0.8500 |" in model_card(family_report(), exported, "ORTModel")
    quantized = member(
        "2x", variant="int8", files=[file(Variant("fp32")), file(Variant("int8"))], accuracy_before_training=before
    )
    assert "before training" not in header([member("dense"), quantized], "spearman")
    assert "0.8500" not in rows([quantized], "spearman")[0]
    card = model_card(family_report(), quantized, "ORTModel")
    assert "| spearman, model.onnx before training | 0.8500 |" in card


def test_the_licence_of_an_engine_stands_in_the_card_also_if_only_the_baseline_ran_on_it() -> None:
    notice = get_engine("deepsparse").notice
    for changes, times in ({}, 0), ({"engine": "deepsparse"}, 1), ({"baseline_engine": "deepsparse"}, 1):
        assert model_card(family_report(**changes), member("2x"), "ORTModel").count(notice) == times


def test_markdown_says_what_training_did_to_the_exported_file() -> None:
    training = TrainingRecord(
        device="cpu", steps=6, examples_per_step=16, seconds=1.0, samples_per_second=96.0, losses=[(1, 0.5), (6, 0.1)]
    )
    files = [file(Variant("fp32"), accuracy={"spearman": 0.86}), file(Variant("int8"), accuracy={"spearman": 0.7})]
    changes: dict[str, Any] = {"training": training, "variant": "int8", "files": files}
    with_score = member("2x", accuracy_before_training={"spearman": 0.85}, **changes)
    text = family_markdown(family_report(member("dense"), with_score, member("3x", **changes), recovery="one-shot"))
    assert "| 0.5 to 0.1 | 0.8500 to 0.8600 |" in text
    assert "| 0.5 to 0.1 | – |" in text


def test_results_that_are_older_than_the_timings_are_named() -> None:
    made_with = {"benchmark": {"torch": "2", "onnx": "1"}, "recover 2x": {"torch": "1", "onnx": "1"}, "prune 2x": {}}
    differing = collect._differing(made_with, made_with["benchmark"])
    assert differing == {"recover 2x": {"torch": "1"}}
    report = family_report().model_copy(update={"versions": made_with["benchmark"], "other_versions": differing})
    text = family_markdown(report)
    assert "- torch 2, onnx 1\n" in text
    assert "- made with torch 1: recover 2x\n" in text
    assert "made with" not in family_markdown(family_report())


def test_a_target_above_the_largest_speedup_says_so() -> None:
    verdict, reason = judge(around(3.0), QUIET, 5.0, SETTINGS, 0, largest=4.1667)
    assert verdict == "missed"
    assert "4.17x" in reason


def test_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "pruned.safetensors"
    save_file(
        {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32), "c": np.zeros((0, 7), np.float32)}, path
    )
    assert report_stage.parameter_count(path) == 17


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, struct.pack("<Q", 1 << 40), b"not a safetensors file at all"])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pruned.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"pruned\.safetensors"):
        report_stage.parameter_count(path)
    with pytest.raises(CorruptArtifactError):
        report_stage.parameter_count(tmp_path / "none.safetensors")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinishedRun:
    """2x reached, 4x missed after three corrections."""
    record = benchmark_record(**{"2x": 2.01, "4x": 3.5})
    made = finished_run(tmp_path, record, {"dense": 0.88, "2x": 0.87, "4x": 0.8})
    monkeypatch.setattr(report_stage, "member_key", lambda run, member: "key")
    made.folder.set_correction("4x", "key", Correction(4.2, 3))
    return made


def test_a_report_is_collected_written_and_read_back(run: FinishedRun) -> None:
    report = report_stage.write_report(run)
    assert FamilyReport.load(run.folder.path / "report.json") == report
    assert [item.name for item in report.members] == ["dense", "2x", "4x"]
    assert [item.verdict for item in report.members] == ["baseline", "reached", "missed"]
    dense, _, missed = report.members
    assert dense.sizes == {"0.attention": 2, "0.ffn": 16, "1.attention": 2, "1.ffn": 16}
    assert (missed.corrections, missed.search_loss, missed.reason[:5]) == (3, None, "all 3")
    assert {item.parameters for item in report.members} == {16}
    assert {item.served.onnx_bytes for item in report.members} == {100}
    assert report.notes == ["a note"]
    for name in ("dense", "2x", "4x"):
        assert (run.member(name).folder / "README.md").read_text(encoding="utf-8").startswith("---\n")
    jsonschema.validate(
        json.loads((run.folder.path / "report.json").read_text(encoding="utf-8")), json_schema("report")
    )


def test_a_run_without_evaluation_still_has_a_report(run: FinishedRun) -> None:
    for name in ("dense", "2x", "4x"):
        (run.member(name).folder / "accuracy.json").unlink()
    report = report_stage.write_report(run)
    assert all(item.served.accuracy == {} for item in report.members)
    assert "## Scores" not in (run.folder.path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["benchmark.json", "pruning/2x.json", "2x/model.onnx", "4x/pruned.safetensors"])
def test_missing_files_are_named_and_no_report_is_written(run: FinishedRun, missing: str) -> None:
    (run.folder.path / missing).unlink()
    with pytest.raises(CorruptArtifactError, match=Path(missing).name.replace(".", r"\.")):
        report_stage.write_report(run)
    assert not (run.folder.path / "report.json").exists()


def test_a_benchmark_that_lacks_a_member_is_refused(run: FinishedRun) -> None:
    benchmark_record(**{"2x": 2.0}).save(run.folder.benchmark)
    with pytest.raises(CorruptArtifactError, match="timing of 4x"):
        report_stage.write_report(run)


@pytest.mark.parametrize("kind", sorted(ARTIFACTS))
def test_saved_artifacts_fit_their_schema(tmp_path: Path, kind: str) -> None:
    examples: dict[str, Any] = {
        "benchmark": benchmark_record(**{"2x": 2.0}),
        "plan": plan(2.0),
        "report": family_report(),
        "table": latency_table(),
    }
    examples[kind].save(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    jsonschema.validate(saved, json_schema(kind))
    for wrong in ({**saved, "kind": "other"}, {**saved, "schema_version": 0}, {**saved, "surplus": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json_schema(kind))


def test_recipe_schema_knows_required_and_unknown_fields() -> None:
    good = {"name": "a", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}
    jsonschema.validate(good, json_schema("recipe"))
    for wrong in ({**good, "speedups": [1]}, {**good, "surplus": 1}, {"name": "a"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json_schema("recipe"))


def test_unknown_schema_names_the_known() -> None:
    with pytest.raises(UsageError, match="benchmark, plan, recipe, report, table"):
        json_schema("html")


def test_a_speedup_whose_interval_includes_one_is_not_called_one() -> None:
    noise = member("1.02x", measured_low=0.99, measured_high=1.05)
    assert shows_no_speedup(noise)
    assert not shows_no_speedup(member("2x"))
    assert not shows_no_speedup(member("dense"))
    report = family_report(member("dense"), noise)
    assert "no speedup is shown" in family_markdown(report)
    assert "not faster beyond noise" in model_card(report, noise, "ORTModel")


def test_tables_have_one_cell_a_title() -> None:
    for members in ([member("dense"), member("2x")], [member("dense", accuracy={})]):
        titles = header(members, "spearman")
        assert all(len(row) == len(titles) for row in rows(members, "spearman"))
    assert "cosine to dense" in header([member("2x")], "spearman")
    assert "spearman" not in header([member("dense", accuracy={})], "spearman")


def test_markdown_cells_cannot_break_the_table() -> None:
    lines = markdown_table(["a"], [["x | y\nz"]])
    assert lines[2] == "| x \\| y z |"


def test_markdown_says_predicted_measured_and_reasons() -> None:
    missed = member("3x", measured_speedup=2.7, verdict="missed", reason="all 3 corrections were used")
    text = family_markdown(family_report(member("dense"), member("2x"), missed))
    for wanted in ("2.020x", "-1.0 %", "all 3 corrections were used", "calibration has few tokens", "A | CPU", "0 / 8"):
        assert wanted in text


def test_card_front_matter_is_yaml_and_hides_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    known_to_the_hub = {
        **{"some/model": True, "bert-base-uncased": True, "package:name": False, "./m": False, "a/b/c": False},
        **{"/home/me/model": False, "models/mine": False, str(tmp_path / "models" / "mine"): False},
    }
    for path, known in known_to_the_hub.items():
        card = model_card(family_report(model=path), member("2x"), "ORTModelForFeatureExtraction")
        facts = yaml.safe_load(card.split("---\n")[1])
        assert ("base_model" in facts) is known
        assert "/home" not in card
        assert str(tmp_path) not in card
        assert facts["tags"] == ["onnx", "ziplm-deploy", "pruned"]
        assert 'ORTModelForFeatureExtraction.from_pretrained("2x")' in card


def test_console_prints_any_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    report = family_report(member("dense"), member("2x", reason="[bold]not markup[/bold]"), notes=["[/] :smile:"])
    console.print_family(report, Path("runs/demo"))
    printed = capsys.readouterr().out
    for wanted in ("[bold]not markup[/bold]", "[/] :smile:", "runs/demo/report.md", "2.00x [1.99, 2.01]", "0.995x"):
        assert wanted in printed.replace("[0.995, ", "0.995x ")


def test_reports_say_which_engine_the_baseline_ran_on(capsys: pytest.CaptureFixture[str]) -> None:
    other = family_report(engine="deepsparse", engine_version="1.8", baseline_engine="onnxruntime")
    other = other.model_copy(update={"baseline_engine_version": "1.31"})
    text = family_markdown(other)
    assert "Dense is the float32 model on onnxruntime 1.31; members run on deepsparse 1.8." in text
    assert "deepsparse 1.8, baseline on onnxruntime 1.31" in text
    card = model_card(other, member("2x"), "ORTModel")
    assert "| dense on onnxruntime 1.31, same run |" in card
    assert "deepsparse 1.8, dense baseline on onnxruntime 1.31" in card
    console.print_family(other, Path("runs/demo"))
    assert "baseline: the dense model on onnxruntime 1.31" in capsys.readouterr().out


def test_an_engine_that_is_the_same_or_not_known_is_no_news(capsys: pytest.CaptureFixture[str]) -> None:
    for baseline in ("onnxruntime", ""):
        report = family_report(baseline_engine=baseline)
        console.print_family(report, Path("runs/demo"))
        assert "baseline: the dense model" not in capsys.readouterr().out
        assert "members run on" not in family_markdown(report)
    assert "| dense, same run |" in model_card(family_report(), member("2x"), "ORTModel")
    assert "baseline on" not in family_markdown(family_report())


def test_files_from_before_the_baseline_engine_was_recorded_are_read(tmp_path: Path) -> None:
    family_report().save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    del saved["baseline_engine"], saved["baseline_engine_version"]
    (tmp_path / "report.json").write_text(json.dumps(saved), encoding="utf-8")
    assert FamilyReport.load(tmp_path / "report.json").baseline_engine == ""


def test_the_snippet_of_a_card_loads_the_file_that_the_figures_are_of() -> None:
    plain = model_card(family_report(), member("2x"), "ORTModel")
    assert 'ORTModel.from_pretrained("2x")  # this folder' in plain
    assert "Stock optimum" not in plain
    quantized = member("2x", variant="int8", files=[file(Variant("fp32")), file(Variant("int8"))])
    card = model_card(family_report(), quantized, "ORTModel")
    assert 'ORTModel.from_pretrained("2x", file_name="model_int8.onnx")' in card
    assert 'ziplm_deploy.load("2x")  # torch: model.onnx, not model_int8.onnx' in card


def test_a_card_says_when_its_figures_are_of_another_engine_than_the_snippet() -> None:
    report = family_report(engine="deepsparse", baseline_engine="onnxruntime")
    card = model_card(report, member("2x", variant="int8", files=[file(Variant("int8"))]), "ORTModel")
    assert "those of model_int8.onnx on deepsparse. Stock optimum runs it on ONNX Runtime" in card
    assert "Stock optimum" not in model_card(report, member("dense"), "ORTModel")  # its figures are the baseline's
    assert "on deepsparse. Stock optimum" in model_card(family_report(engine="deepsparse"), member("dense"), "ORTModel")


def test_aa_line_tells_noise() -> None:
    assert "up to 1.00 % from 1: trust no smaller difference" in aa_line(Ratio(1.0, 0.99, 1.01), 0.02)
    assert "up to 0.60 % from 1: trust no smaller" in aa_line(Ratio(1.004, 1.001, 1.006), 0.02)
    assert "up to 2.04 % from 1: more than the 2 % that" in aa_line(Ratio(1.0, 0.98, 1.0204), 0.02)
    assert "up to 7.00 % from 1: more than the 2 % that verdicts allow" in aa_line(Ratio(1.05, 1.03, 1.07), 0.02)
    assert "up to more than 100 % from 1: more than" in aa_line(Ratio(0.992, 0.265, 2.242), 0.02)
