"""Whole runs with what users get without pruning beside the members; the pages themselves: tests/baselines."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ziplm_deploy
from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, recipe, stamps, write_rows, written_again
from ziplm_deploy.baselines import BaselineScores, DenseSource, get_baseline, onnxruntime_int8
from ziplm_deploy.errors import EngineError, RecipeError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.models.member_files import WEIGHTS_FILE
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.recovery.distillation import Distillation
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.benchmark import is_benchmarked

INT8 = "onnxruntime-int8"
CONTROL = "dense-trained-on"


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the tool of a baseline be missing."""

    def missing(self: object) -> str:
        raise EngineError(f"expected the tool of {name}, found it not installed; run: pip install it")

    monkeypatch.setattr(type(get_baseline(name)), "tool", missing)


def with_baselines(folder: Path, *names: str, **changes: Any) -> Any:
    return recipe(folder, **{**changes, "benchmark": {"baselines": list(names)}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and a finished run with all baselines but OpenVINO's."""
    folder = tmp_path_factory.mktemp("baselines")
    save_dense(folder / "model", task="text-classification", num_hidden_layers=1)
    write_rows(folder / "train.jsonl", 80, 0)
    write_rows(folder / "test.jsonl", 30, 1)
    with pytest.MonkeyPatch.context() as patch:
        without(patch, "openvino-int8")
        run_pipeline(recipe(folder, benchmark={"baselines": None}))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.slow
def test_by_default_all_that_can_be_made_here_are_measured(made: Path) -> None:
    run_dir = made / "runs" / "tiny"
    report = FamilyReport.load(run_dir / "report.json")
    assert [each.name for each in report.baselines] == [INT8, "torch"]
    assert report.notes[-1].startswith("baseline openvino-int8 was not measured: expected the tool of openvino-int8")
    int8, eager = report.baselines
    assert (int8.engine, eager.engine) == ("onnxruntime", "torch")
    dense = report.members[0].served
    assert eager.accuracy == dense.accuracy  # the ONNX file was checked against it
    assert set(int8.accuracy) == set(dense.accuracy)
    assert eager.size_bytes > 0
    for each in report.baselines:
        assert each.measured_low <= each.measured_speedup <= each.measured_high
        assert each.tool
        assert each.settings
    assert eager.measured_speedup < 1
    timed = {timing.name: timing for timing in BenchmarkRecord.load(run_dir / "benchmark.json").variants}
    assert {"dense", "1.5x", INT8, "torch"} == set(timed)
    assert len(timed["torch"].samples_ms) == len(timed["dense"].samples_ms)  # of the same rounds
    assert (run_dir / "baselines" / INT8 / "model.onnx").is_file()
    assert set(int8.accuracy_intervals) == set(int8.of_dense) == {"accuracy", "macro_f1"}
    gains = BaselineScores.load(run_dir / "baselines" / "scores.json").gains
    assert {label: set(found) for label, found in gains.items()} == {"1.5x": {INT8, "torch"}}
    pruned = report.members[1].served
    assert pruned.recommended == (not pruned.beaten_by and not pruned.undecided_against)
    assert pruned.over_torch is not None
    assert dense.over_torch is not None
    assert dense.over_torch.value > 1
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.slow
def test_the_report_shows_them_beside_the_members(made: Path) -> None:
    text = family_markdown(FamilyReport.load(made / "runs" / "tiny" / "report.json"))
    members = text.partition("## Members")[2].partition("##")[0]
    assert f"| {INT8} | – | – |" in members
    assert "stock dynamic INT8 of ONNX Runtime |" in members
    assert "## Baselines" in text
    assert "AutoQuantizationConfig." in text.partition("## Baselines")[2]


@pytest.mark.slow
def test_a_second_run_makes_and_measures_nothing_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino-int8")
    again = written_again(copied, recipe(copied, benchmark={"baselines": None}))
    assert not {name for name in again if name.startswith("baselines/") or name == "benchmark.json"}


@pytest.mark.slow
def test_without_any_nothing_is_left(copied: Path) -> None:
    report = run_pipeline(with_baselines(copied))
    assert report.baselines == []
    assert not any("baseline" in note for note in report.notes)
    assert not list((copied / "runs" / "tiny" / "baselines").iterdir())
    assert "## Baselines" not in family_markdown(report)


@pytest.mark.slow
def test_one_that_is_named_and_missing_ends_the_run_at_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino-int8")
    before = stamps(copied)
    with pytest.raises(EngineError, match=r"expected the tool of openvino-int8.*run: pip install it"):
        run_pipeline(with_baselines(copied, "openvino-int8", name="other"))
    assert stamps(copied) == before
    assert not (copied / "runs" / "other" / "profile.json").exists()


@pytest.mark.slow
def test_a_tool_that_refuses_the_model_is_a_note_or_an_error(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, dense: DenseSource, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise EngineError("expected a model of its taste, found another one; leave it out")

    monkeypatch.setattr(onnxruntime_int8.OnnxRuntimeInt8, "make", refuse)
    without(monkeypatch, "torch")
    without(monkeypatch, "openvino-int8")
    (copied / "runs" / "tiny" / "baselines" / INT8 / "model.onnx").unlink()  # so that it is made again
    report = run_pipeline(recipe(copied, benchmark={"baselines": None}))
    assert report.baselines == []
    assert any("of its taste" in note for note in report.notes)
    with pytest.raises(EngineError, match="of its taste"):
        run_pipeline(with_baselines(copied, INT8))
    assert [path.name for path in (copied / "runs" / "tiny" / "baselines").iterdir()] == [f"{INT8}.json"]


@pytest.mark.slow
def test_a_file_that_its_engine_cannot_run_is_not_timed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nonsense(self: object, dense: DenseSource, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"no graph")

    monkeypatch.setattr(onnxruntime_int8.OnnxRuntimeInt8, "make", write_nonsense)
    (copied / "runs" / "tiny" / "baselines" / INT8 / "model.onnx").unlink()
    with pytest.raises(EngineError, match="expected the engine to load"):
        run_pipeline(with_baselines(copied, INT8))
    assert not (copied / "runs" / "tiny" / "baselines" / INT8).exists()


def answerless(environment: object, path: Path) -> Any:
    """A runner in the place of an engine's that fails over every example."""

    def fail(*arguments: object) -> None:
        raise EngineError("expected 8 rows, found 0")

    return contextlib.nullcontext(fail)


@pytest.mark.slow
def test_one_that_cannot_answer_is_not_measured(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ziplm_deploy.stages.baselines.open_runner", answerless)
    without(monkeypatch, "openvino-int8")
    folder = copied / "runs" / "tiny" / "baselines"
    (folder / INT8 / "model.onnx").unlink()
    report = run_pipeline(recipe(copied, benchmark={"baselines": None}))
    assert INT8 not in {each.name for each in report.baselines}
    assert f"baseline {INT8} was not measured: expected 8 rows, found 0" in report.notes
    assert not (folder / INT8).exists()
    with pytest.raises(EngineError, match="expected 8 rows"):
        run_pipeline(with_baselines(copied, INT8))


@pytest.mark.slow
def test_one_that_fails_over_examples_is_not_scored(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino-int8")
    (copied / "runs" / "tiny" / "baselines" / f"{INT8}-accuracy.json").unlink()
    changed = recipe(copied, benchmark={"baselines": None})
    with monkeypatch.context() as failing:
        failing.setattr("ziplm_deploy.stages.evaluate.open_runner", answerless)
        report = run_pipeline(changed)
        note = f"baseline {INT8} was not scored: expected 8 rows, found 0"
        scored = {each.name: bool(each.accuracy) for each in report.baselines}
        assert (scored[INT8], scored["torch"], note in report.notes) == (False, True, True)
        assert f"| {INT8} |" in family_markdown(report)
        assert ziplm_deploy.report(changed).baselines == report.baselines, "nothing is measured again"
        with pytest.raises(EngineError, match="expected 8 rows"):
            run_pipeline(with_baselines(copied, INT8))
    report = run_pipeline(changed)
    assert note not in report.notes
    assert all(each.accuracy for each in report.baselines)


@pytest.mark.slow
def test_another_dense_model_or_tool_makes_them_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dense(copied / "model", task="text-classification", num_hidden_layers=1, seed=1)
    changed = with_baselines(copied, INT8)
    again = written_again(copied, changed)
    assert {f"baselines/{INT8}/model.onnx", f"baselines/{INT8}-accuracy.json", "benchmark.json"} <= again
    monkeypatch.setattr(onnxruntime_int8, "READ_IN", "0.0.9")
    again = written_again(copied, changed)
    assert f"baselines/{INT8}/model.onnx" in again
    assert "benchmark.json" not in again  # the file is the same


@pytest.mark.slow
def test_damaged_weights_beside_a_file_are_measured_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino-int8")
    given = recipe(copied, benchmark={"baselines": None})
    with Run(given) as run:
        assert is_benchmarked(run)
    config = copied / "runs" / "tiny" / "baselines" / "torch" / "config.json"
    text = config.read_text(encoding="utf-8")
    assert '"gelu"' in text
    config.write_text(text.replace('"gelu"', '"relu"'), encoding="utf-8")  # of another size it would be made again
    with Run(given) as run:
        assert not is_benchmarked(run)


@pytest.mark.slow
def test_where_members_learn_from_labels_so_does_a_dense_model(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = copied / "runs" / "tiny"
    labelled = {"mode": "gradual", "max_steps": 3, "batch_size": 16, "learning_rate": 0.01, "task_weight": 1.0}
    report = run_pipeline(recipe(copied, benchmark={"baselines": [CONTROL]}, recover=labelled, speedups=[1.3, 1.5]))
    (control,) = report.baselines
    dense, *members = (member.served for member in report.members)
    assert control.of_dense.keys() == dense.accuracy.keys()
    assert any(note.startswith("members learned from labels") and CONTROL in note for note in report.notes)
    record = TrainingRecord.load(run_dir / "recovery" / CONTROL / "training.json")
    assert record.steps == 3
    trained, before = (
        load_file(path)
        for path in (run_dir / "recovery" / CONTROL / WEIGHTS_FILE, copied / "model" / "model.safetensors")
    )
    assert any(not torch.equal(trained[name], before[name]) for name in trained.keys() & before.keys())
    gains = BaselineScores.load(run_dir / "baselines" / "scores.json").gains
    assert set(gains) == {"1.3x", "1.5x"}
    assert len(members) == 2

    def fail(self: object, *arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Distillation, "train", fail)
    again = recipe(copied, benchmark={"baselines": [CONTROL]}, recover=labelled, speedups=[1.3, 1.5])
    assert not {name for name in written_again(copied, again) if CONTROL in name}


@pytest.mark.slow
def test_a_dense_model_that_would_learn_nothing_is_not_trained_on(copied: Path) -> None:
    label_free = {"mode": "one-shot", "max_steps": 3, "batch_size": 16}
    with pytest.raises(RecipeError, match=rf"for the baseline {CONTROL}, found recover\.mode: one-shot without labels"):
        run_pipeline(with_baselines(copied, CONTROL, recover=label_free))
    with pytest.raises(RecipeError, match=r"found recover\.mode: none"):
        run_pipeline(with_baselines(copied, CONTROL))
    assert not (copied / "runs" / "tiny" / "recovery").exists()


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"benchmark.baselines.0.*onnxruntime-int8"):
        parse_recipe(raw_recipe(tmp_path, benchmark={"baselines": ["tensorrt"]}))
    with pytest.raises(
        RecipeError,
        match="expected a baseline of dense-trained-on, onnxruntime-int8, openvino-int8, torch, found 'mine'",
    ):
        get_baseline("mine")
