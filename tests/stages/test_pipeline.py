"""The whole way on a tiny model, with the real engine: results, resume, what one changed field reruns, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ziplm_deploy
from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, recipe, stamps, write_rows, written_again
from ziplm_deploy import api
from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import (
    CorruptArtifactError,
    DataError,
    EngineError,
    EnvironmentMismatchError,
    IncompatibleArtifactError,
    NumericalError,
    ParityError,
    TargetUnreachableError,
)
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.pipeline import run_pipeline as run
from ziplm_deploy.recipe import Recipe, Variant, parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.record import Scores
from ziplm_deploy.tasks.resampling import ResampledScores


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model and data, and one finished run of 1.5x and 2.5x."""
    folder = tmp_path_factory.mktemp("pipeline")
    # large enough that layers, not overhead, take the time
    save_dense(
        folder / "model", task="text-classification", hidden_size=128, intermediate_size=512, num_hidden_layers=3
    )
    write_rows(folder / "train.jsonl", 80, 0)
    write_rows(folder / "test.jsonl", 30, 1)
    run(recipe(folder, speedups=[1.5, 2.5]))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def exported_again(folder: Path, changed: Recipe) -> set[str]:
    """Files that are made again up to the ONNX files of members, which then stay unmeasured."""
    before = stamps(folder)
    api.export(changed)
    return {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}


def test_every_member_has_a_complete_folder_and_a_place_in_the_report(made: Path) -> None:
    run_dir = made / "runs" / "tiny"
    report = FamilyReport.load(run_dir / "report.json")
    assert [m.name for m in report.members] == ["dense", "1.5x", "2.5x"]
    for member in report.members:
        folder = run_dir / member.name
        for name in ("model.onnx", "config.json", "pruned.safetensors", "ziplm_config.json", "README.md"):
            assert (folder / name).stat().st_size > 0, name
        assert 0 <= member.served.accuracy["accuracy"] <= 1
        assert member.served.measured_low <= member.served.measured_speedup <= member.served.measured_high
    predicted = [m.predicted_speedup for m in report.members[1:]]
    assert (predicted[0] or 0) >= 1.5
    assert (predicted[1] or 0) >= 2.5
    assert report.members[2].parameters < report.members[1].parameters < report.members[0].parameters
    assert not list(run_dir.rglob("*.tmp"))


def test_scores_can_be_computed_again_from_the_outcomes_beside_them(made: Path) -> None:
    run_dir, task = made / "runs" / "tiny", get_task("text-classification")
    found = [Scores.load(run_dir / name / "accuracy.json") for name in ("dense", "1.5x", "2.5x")]
    assert len({scores.examples for scores in found}) == 1  # the same rows: they compare example by example
    for name, scores in zip(("dense", "1.5x", "2.5x"), found, strict=True):
        assert scores.outcomes_hash is not None
        outcomes = Outcomes.load(run_dir / name / "outcomes.json", scores.outcomes_hash)
        assert len(outcomes) == scores.n_rows
        assert task.scores(outcomes) == scores.scores


def test_the_report_says_how_sure_the_scores_are(made: Path) -> None:
    run_dir, task = made / "runs" / "tiny", get_task("text-classification")
    members = FamilyReport.load(run_dir / "report.json").members
    found = [
        ResampledScores(task, Outcomes.load(path, file_hash(path)))
        for path in (run_dir / member.name / "outcomes.json" for member in members)
    ]
    assert members[0].served.of_dense == {}
    for member, resampled in zip(members, found, strict=True):
        assert member.served.accuracy_intervals == {name: resampled.interval(name) for name in task.metrics}
        low, high = member.served.accuracy_intervals["accuracy"]
        assert low <= member.served.accuracy["accuracy"] <= high
        if member is not members[0]:
            assert member.served.of_dense == {name: resampled.beside(found[0], name) for name in task.metrics}


def test_members_load_and_answer_like_their_onnx_file(made: Path) -> None:
    from ziplm_deploy.engines.runner import onnx_runner

    folder = made / "runs" / "tiny" / "2.5x"
    model = ziplm_deploy.load(folder)
    ids = torch.randint(5, 19, (3, 11))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.inference_mode():
        expected = model(**inputs).logits
    found = onnx_runner(folder / "model.onnx")({name: value.numpy() for name, value in inputs.items()})["logits"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_second_run_measures_nothing_again(copied: Path) -> None:
    again = written_again(copied, recipe(copied, speedups=[1.5, 2.5], output_dir=str(copied / "runs")))
    # model and data moved with the copy, their contents did not change
    assert not {name for name in again if name.endswith((".onnx", ".safetensors", "profile.json", "benchmark.json"))}


def test_a_changed_field_reruns_only_what_depends_on_it(copied: Path) -> None:
    fields: dict[str, Any] = {"speedups": [1.5, 2.5], "data": {"n_evaluation": 20}}
    again = written_again(copied, recipe(copied, **fields))
    assert {"1.5x/accuracy.json", "1.5x/outcomes.json"} <= again
    assert not {name for name in again if name.endswith((".onnx", ".safetensors", "profile.json", "benchmark.json"))}
    fields["prune"] = {"damping": 0.1}
    again = exported_again(copied, recipe(copied, **fields))
    assert {"pruning/database.safetensors", "1.5x/model.onnx"} <= again
    assert "profile.json" not in again
    assert "dense/model.onnx" not in again


def test_a_new_target_costs_a_search_and_keeps_the_others(copied: Path) -> None:
    again = exported_again(copied, recipe(copied, speedups=[1.5, 2, 2.5]))
    assert "2x/model.onnx" in again
    kept = ("profile.json", "pruning/database.safetensors", "1.5x/model.onnx", "2.5x/model.onnx")
    assert not again.intersection(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_continues(made: Path, tmp_path: Path, number: int, code: int) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("runs"))
    raw = raw_recipe(folder, profile={"table": str(made / "runs" / "tiny" / "profile.json")})
    (folder / "recipe.yaml").write_text(json.dumps(raw), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "ziplm_deploy", "run", str(folder / "recipe.yaml"), "--quiet"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], start_new_session=True
    )
    table = folder / "runs" / "tiny" / "profile.json"
    deadline = time.monotonic() + 400
    manifest = folder / "runs" / "tiny" / "manifest.json"
    while time.monotonic() < deadline and process.poll() is None:
        if manifest.exists() and "profile" in json.loads(manifest.read_text(encoding="utf-8"))["stages"]:
            break
        time.sleep(0.05)
    if process.poll() is None:
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    if process.returncode in (0, 3, 4):  # done; 3: it missed its target, 4: noise left that open, as tiny models may
        pytest.skip("the run ended before it could be interrupted")
    assert process.returncode == code, errors
    assert "the same command continues where it was" in errors
    assert not (folder / "runs" / "tiny" / ".lock").exists()
    assert not list((folder / "runs").rglob("*.tmp"))
    stamp = table.stat().st_mtime_ns
    report = run(parse_recipe(raw))
    assert [m.name for m in report.members] == ["dense", "1.5x"]
    assert table.stat().st_mtime_ns == stamp


def test_an_unreachable_target_ends_before_calibration(copied: Path) -> None:
    (copied / "runs" / "tiny" / "pruning" / "database.safetensors").unlink()
    with pytest.raises(TargetUnreachableError, match=r"reaches \d+\.\d+x") as caught:
        run(recipe(copied, speedups=[500.0]))
    assert math.isfinite(caught.value.largest_speedup)
    assert not (copied / "runs" / "tiny" / "pruning" / "database.safetensors").exists()


def test_a_foreign_table_is_refused_unless_asked_for(copied: Path) -> None:
    table = LatencyTable.load(copied / "runs" / "tiny" / "profile.json")
    foreign = table.model_copy(update={"machine": table.machine.model_copy(update={"cpu_model": "Z80"})})
    foreign.save(copied / "foreign.json")
    with pytest.raises(IncompatibleArtifactError, match="Z80"):
        api.profile(recipe(copied, profile={"table": str(copied / "foreign.json")}))
    report = run(recipe(copied, profile={"table": str(copied / "foreign.json"), "allow_foreign_table": True}))
    assert len(report.members) == 2
    [note] = [note for note in report.notes if "another machine" in note]
    assert "Z80" in note
    for work in (api.profile, api.report):  # also in a folder that has taken it over
        with pytest.raises(IncompatibleArtifactError, match="Z80"):
            work(recipe(copied, profile={"table": str(copied / "foreign.json")}))
    api.profile(recipe(copied))
    assert "another machine" not in (copied / "runs" / "tiny" / "manifest.json").read_text(encoding="utf-8")
    table.model_copy(update={"variant": Variant.INT8}).save(copied / "int8.json")
    with pytest.raises(IncompatibleArtifactError, match="int8"):
        api.profile(recipe(copied, profile={"table": str(copied / "int8.json"), "allow_foreign_table": True}))


def test_a_file_is_compared_with_what_is_allowed_now(copied: Path) -> None:
    before = stamps(copied)
    with pytest.raises(ParityError, match="'export dense' within 1e-13 of torch"):
        run(recipe(copied, speedups=[1.5, 2.5], benchmark={"parity_atol": 1e-13}))
    with pytest.raises(ParityError, match="'export dense' within 1e-13 of torch"):
        api.report(recipe(copied, speedups=[1.5, 2.5], benchmark={"parity_atol": 1e-13}))
    run(recipe(copied, speedups=[1.5, 2.5]))
    again = {name for name, stamp in stamps(copied).items() if before.get(name) != stamp}
    assert not {name for name in again if name.endswith((".onnx", ".safetensors", "benchmark.json"))}


def test_benchmark_again_times_the_same_files_again(copied: Path) -> None:
    given = recipe(copied, speedups=[1.5, 2.5])
    before = stamps(copied)
    api.benchmark(given)
    assert stamps(copied)["benchmark.json"] == before["benchmark.json"]
    api.benchmark(given, again=True)
    again = {name for name, stamp in stamps(copied).items() if before.get(name) != stamp}
    assert "benchmark.json" in again
    assert not {name for name in again if name.endswith((".onnx", ".safetensors", "profile.json"))}


@pytest.mark.parametrize("name", ["profile.json", "pruning/database.safetensors", "1.5x/pruned.safetensors"])
def test_damaged_artifacts_are_errors_that_name_the_file(copied: Path, name: str) -> None:
    path = copied / "runs" / "tiny" / name
    path.write_bytes(bytes(path.stat().st_size))  # zeros, as a power cut may leave them
    # another target needs the database, another way to export the weights
    changes = {"export": {"embed_in_graph": False}} if "pruned" in name else {"speedups": [1.5, 1.8]}
    with pytest.raises(CorruptArtifactError, match=path.name):
        run(recipe(copied, **changes))


def test_what_was_cut_short_is_made_again(copied: Path) -> None:
    run_dir = copied / "runs" / "tiny"
    cut = [run_dir / name for name in ("pruning/database.safetensors", "1.5x/pruned.safetensors", "1.5x/vocab.txt")]
    cut = [path for path in cut if path.exists()] + sorted((run_dir / "dense").glob("tokenizer.json"))
    before = {path: path.read_bytes() for path in cut}
    for path in cut:
        path.write_bytes(before[path][: len(before[path]) // 2])
    run(recipe(copied, speedups=[1.5, 2.5]))
    assert {path: path.read_bytes() for path in cut} == before
    assert len(cut) >= 3


def test_bad_data_ends_the_run_at_once(copied: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match="n_calibration"):
        run(recipe(copied, name="other", data={"n_calibration": 1000}))
    (copied / "test.jsonl").write_text('{"text": "a cat", "label": 7}\n', encoding="utf-8")
    with pytest.raises(DataError, match="7"):
        run(recipe(copied, name="other"))
    assert time.monotonic() - began < 30
    assert not (copied / "runs" / "other" / "profile.json").exists()


def test_more_threads_than_granted_are_refused(copied: Path) -> None:
    with pytest.raises(EnvironmentMismatchError, match="threads"):
        run(recipe(copied, name="other", environment={"threads": 4096}))


def test_activations_that_are_not_finite_name_their_layer(copied: Path) -> None:
    path = copied / "model" / "model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.dense.weight"].fill_(3e38)  # finite itself
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(NumericalError, match=r"2\.attention|1\.ffn|layer"):
        run(recipe(copied))


def test_a_baseline_goes_the_same_way(copied: Path) -> None:
    report = run(recipe(copied, prune={"method": "magnitude"}))
    assert report.method == "magnitude"
    assert len(report.members) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "export"), [("openvino", {}), ("deepsparse", {"shapes": "static", "opset": 16})])
def test_another_engine_goes_the_same_way(made: Path, tmp_path: Path, engine: str, export: dict[str, Any]) -> None:
    try:
        version = get_engine(engine).version()
    except EngineError as missing:
        pytest.skip(str(missing))
    shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))
    changes = {"environment": {"engine": engine, "workload": {"seq_len": 32}}, "export": export}
    report = run(recipe(tmp_path / "copy", **changes))
    assert (report.engine, report.engine_version) == (engine, version)
    assert LatencyTable.load(tmp_path / "copy" / "runs" / "tiny" / "profile.json").engine == engine
    dense = FamilyReport.load(made / "runs" / "tiny" / "report.json").members[0]
    assert report.members[0].served.accuracy == dense.served.accuracy  # the same model, whatever runs it
    assert any("licence" in note for note in report.notes) == (engine == "deepsparse")
