"""Compression at the end of the whole way, on a tiny model with the real engine: files, records, report, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ziplm_deploy
from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, recipe, stamps, write_rows, written_again
from ziplm_deploy.compression.int8 import budget as int8_budget
from ziplm_deploy.compression.int8 import embeddings as int8_embeddings
from ziplm_deploy.compression.int8.budget import Spared, SparedChoice
from ziplm_deploy.compression.int8.embeddings import has_rounded_embeddings
from ziplm_deploy.compression.int8.neural_compressor import NeuralCompressorResult
from ziplm_deploy.compression.int8.quantize import linear_names, quantize, quantized_linears
from ziplm_deploy.compression.records import Int8Record
from ziplm_deploy.compression.sparsity.masks import check_masks_in_onnx, sparsity_of
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.errors import CorruptArtifactError, EngineError, NumericalError, RecipeError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.member_files import replace_member
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.pipeline import run_pipeline as run
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Recipe, Variant, parse_recipe
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages import benchmark as benchmark_stage
from ziplm_deploy.stages import quantize as quantize_stage
from ziplm_deploy.stages.compress import compress_member
from ziplm_deploy.stages.export import export_member
from ziplm_deploy.stages.stage import Stage

VARIANTS = ["int8", "sparse", "sparse-int8"]
COMPRESS = {"variants": VARIANTS, "int8": {"n_calibration": 16}}


@pytest.fixture(scope="module", autouse=True)
def a_small_vocabulary_is_rounded_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_embeddings, "MIN_ROWS", 60)
        patch.setattr(int8_embeddings, "MIN_SAVED_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and a finished run of one member with every variant."""
    folder = tmp_path_factory.mktemp("compressed")
    save_dense(folder / "model", task="text-classification", hidden_size=64, intermediate_size=512, num_hidden_layers=2)
    write_rows(folder / "train.jsonl", 64, 0)
    write_rows(folder / "test.jsonl", 30, 1)
    run(recipe(folder, compress=COMPRESS))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The finished run once more, to go on from under other settings of compression."""
    return Path(shutil.copytree(made / "runs" / "tiny", tmp_path / "runs" / "tiny"))


def member(folder: Path, name: str = "1.5x") -> Path:
    return folder / "runs" / "tiny" / name


STATIC = {"method": "static", "n_calibration": 8, "max_fp32_share": 0.0}


def for_int8(made: Path, output_dir: Path, int8: dict[str, Any]) -> Recipe:
    """A recipe whose targets are about files in static INT8."""
    compress = {"variants": ["int8"], "target": "int8", "int8": int8}
    return parse_recipe(raw_recipe(made, compress=compress, output_dir=str(output_dir), export={"shapes": "static"}))


def test_every_variant_is_a_file_of_its_own_with_accuracy_latency_and_size(made: Path) -> None:
    report = FamilyReport.load(made / "runs" / "tiny" / "report.json")
    for found in report.members:
        assert [file.variant for file in found.files] == ["fp32", *VARIANTS]
        for file in found.files:
            path = member(made, found.name) / file.file
            assert file.onnx_bytes == path.stat().st_size
            assert 0 < file.gzip_bytes < 1.01 * file.onnx_bytes
            assert file.p50_ms > 0
            assert 0 <= file.accuracy["accuracy"] <= 1
            assert file.recommended == (not file.reason)
        # On a noisy machine the pruned one may have been left with little but embeddings, which stay float32.
        share = 0.6 if found.name == "dense" else 1.0
        sizes = {file.variant: file.onnx_bytes for file in found.files}
        assert sizes["int8"] < share * sizes["fp32"]
        zipped = {file.variant: file.gzip_bytes for file in found.files}
        assert zipped["sparse"] < share * zipped["fp32"]


def test_zeros_of_the_checkpoint_are_those_of_both_sparse_files(made: Path) -> None:
    sparse = ziplm_deploy.load(made / "runs" / "tiny" / "compression" / "1.5x" / "sparse")
    assert sparsity_of(sparse) == pytest.approx(0.8, abs=0.01)
    for name in ("model_sparse.onnx", "model_sparse_int8.onnx"):
        check_masks_in_onnx(member(made) / name, sparse)
    record = SparsityRecord.load(made / "runs" / "tiny" / "compression" / "1.5x" / "sparsity.json")
    assert record.sparsity == pytest.approx(sparsity_of(sparse), abs=1e-6)


def test_int8_files_compute_in_integers_but_for_what_the_record_names(made: Path) -> None:
    for variant, before in (("int8", "model.onnx"), ("sparse-int8", "model_sparse.onnx")):
        record = Int8Record.load(made / "runs" / "tiny" / "compression" / "1.5x" / f"{variant}.json")
        path = member(made) / f"model_{variant.replace('-', '_')}.onnx"
        assert set(quantized_linears(path)) == set(linear_names(member(made) / before)) - set(record.fp32_linears)
        assert record.n_linears == len(record.sensitivities) == len(linear_names(member(made) / before))
        assert record.within_budget is not None
        assert record.embeddings
        assert has_rounded_embeddings(path)
        divergences = [row.divergence for row in record.sensitivities]
        assert divergences == sorted(divergences, reverse=True)


def test_report_and_card_list_every_file(made: Path) -> None:
    text = (made / "runs" / "tiny" / "report.md").read_text(encoding="utf-8")
    card = (member(made) / "README.md").read_text(encoding="utf-8")
    for name in ("model.onnx", "model_int8.onnx", "model_sparse.onnx", "model_sparse_int8.onnx"):
        assert text.count(f"| {name} |") == 2  # dense and 1.5x
        assert f"| {name} |" in card
    assert "(unstructured)" in card
    assert "INT8 dynamic" in card


def test_a_finished_run_does_nothing_and_a_changed_setting_redoes_what_depends_on_it(copied: Path, made: Path) -> None:
    folder, output_dir = copied.parents[1], str(copied.parent)
    again = written_again(folder, recipe(made, compress=COMPRESS, output_dir=output_dir))
    assert not {name for name in again if name.endswith(".onnx")}
    before = stamps(folder)
    changed = {**COMPRESS, "int8": {"n_calibration": 16, "per_channel": False}}
    ziplm_deploy.compress(recipe(made, compress=changed, output_dir=output_dir))
    written = {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}
    files = ("model_int8.onnx", "model_sparse_int8.onnx")
    assert {name for name in written if name.endswith(".onnx")} == {
        f"{name}/{file}" for name in ("dense", "1.5x") for file in files
    }


@pytest.mark.slow
def test_a_target_of_int8_is_profiled_and_measured_in_int8(tmp_path: Path, made: Path) -> None:
    report = run(for_int8(made, tmp_path, STATIC))
    folder = tmp_path / "tiny"
    table = LatencyTable.load(folder / "profile.json")
    assert table.variant == "int8"
    assert "static INT8" in table.form
    stand_in = folder / "pruning" / "1.5x-int8.onnx"
    assert quantized_linears(stand_in) == quantized_linears(folder / "1.5x" / "model_int8.onnx")
    faster = report.members[1]
    assert faster.served.variant == "int8"
    file = next(file for file in faster.files if file.variant == "int8")
    assert faster.served.measured_speedup == file.measured_speedup
    assert faster.served.accuracy == file.accuracy
    with pytest.raises(ziplm_deploy.errors.IncompatibleArtifactError, match="variant"):
        run(recipe(made, name="other", output_dir=str(tmp_path), profile={"table": str(folder / "profile.json")}))


@pytest.mark.slow
def test_a_target_that_float32_linears_cost_is_solved_again(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_two(rows: Any, evaluate: Any, reference: float, config: Any) -> SparedChoice:
        kept = tuple(row.name for row in rows[: min(2, len(rows) - 1)])  # a noisy table may leave few linears
        return SparedChoice(evaluate(Spared(kept)), reference, ((2, reference),), True, spared=Spared(kept))

    plans: list[PruningPlan] = []

    def slower_at_first(of: Run) -> BenchmarkRecord:
        record = benchmark_stage.benchmark(of)
        plans.append(PruningPlan.load(of.pruned_members[0].plan))
        in_loop = BenchmarkRecord.load(of.folder.generation_benchmark("dense")).variant("1.5x").speedup
        measured = min(1.1, 0.9 * in_loop) if len(plans) == 1 else 1.5  # a noisy machine measures little in the loop
        figures = dict.fromkeys(("speedup", "speedup_low", "speedup_high"), measured)
        record.variant("1.5x int8").__dict__.update(figures)
        record.__dict__.update(dict.fromkeys(("aa_ratio", "aa_low", "aa_high"), 1.0))  # of a quiet machine
        return record

    monkeypatch.setattr(int8_budget, "spare_linears", keep_two)
    stage = Stage("benchmark", benchmark_stage.STAGE.describe, slower_at_first)
    monkeypatch.setattr(benchmark_stage, "STAGE", stage)
    recipe_of_int8 = for_int8(made, tmp_path, {**STATIC, "max_fp32_share": 0.5})
    run(recipe_of_int8)
    before, after = plans
    assert not {name for name in written_again(tmp_path, recipe_of_int8) if "benchmark" in name}
    assert after.budget_ms < before.budget_ms
    assert after.predicted_speedup > before.predicted_speedup
    manifest = json.loads((tmp_path / "tiny" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["corrections"]["1.5x"]["float32_restarts"] == 1
    assert manifest["corrections"]["1.5x"]["float32_slowdown"] > 1
    assert manifest["ended_loop"] not in (None, manifest["stages"]["benchmark"])  # that one is not reported


@pytest.mark.slow
def test_training_with_zeros_and_rounding_keeps_the_zeros(copied: Path, made: Path) -> None:
    settings = {
        "variants": ["sparse", "sparse-int8"],
        "train": {"mode": "gradual", "max_steps": 2, "batch_size": 8},
        "int8": {"method": "qat", "n_calibration": 8},
        "sparsity": {"pattern": "block4", "passes": 2, "distribution": "sensitivity"},
    }
    ziplm_deploy.compress(recipe(made, compress=settings, output_dir=str(copied.parent)))
    assert TrainingRecord.load(copied / "compression" / "1.5x" / "sparse" / "training.json").steps == 2
    record = Int8Record.load(copied / "compression" / "1.5x" / "sparse-int8.json")
    assert record.training is not None
    assert record.training.steps == 2
    sparse = ziplm_deploy.load(copied / "compression" / "1.5x" / "sparse")
    for name in ("model_sparse.onnx", "model_sparse_int8.onnx"):
        check_masks_in_onnx(copied / "1.5x" / name, sparse)
    left = {path.name for path in (copied / "compression" / "1.5x").iterdir()} - {"int8.json"}  # of the run before
    assert left == {"linears.json", "sparse", "sparse-int8.json", "sparsity.json"}
    assert not (copied / "recovery").exists()


def test_variants_that_are_no_longer_asked_for_go(copied: Path, made: Path) -> None:
    run(recipe(made, output_dir=str(copied.parent)))
    for name in ("dense", "1.5x"):
        assert [path.name for path in (copied / name).glob("*.onnx")] == ["model.onnx"]
        assert not (copied / name / "accuracy_int8.json").exists()


def test_a_member_without_any_module_left_has_its_files_all_the_same(copied: Path, made: Path) -> None:
    started = Run(recipe(made, output_dir=str(copied.parent), compress=COMPRESS))
    [left] = started.pruned_members
    empty = random_resized(
        ziplm_deploy.load(left.folder), dict.fromkeys(("0.attention", "0.ffn", "1.attention", "1.ffn"), 0)
    )
    replace_member(left.folder, empty, started.dense.processor, started.recipe.model, {})
    export_member(started, left, left.folder)
    compress_member(started, left)
    int8 = left.file(Variant.INT8)
    assert quantized_linears(int8.path) == ()
    assert has_rounded_embeddings(int8.path)
    record = Int8Record.load(int8.int8_record)
    assert (record.n_linears, record.embeddings) == (0, True)
    assert SparsityRecord.load(left.sparsity_record).linears == []


@pytest.mark.parametrize("embeddings", [True, False])
def test_embeddings_of_neural_compressors_files_are_rounded_before_they_are_scored(
    copied: Path, made: Path, monkeypatch: pytest.MonkeyPatch, embeddings: bool
) -> None:
    scored: list[bool] = []

    def tool(source: Path, target: Path, int8: Any, *, evaluate: Any, **others: Any) -> NeuralCompressorResult:
        """Quantizes as the real one does, but here: it scores the float32 file, then a candidate."""
        plain = int8.config.model_copy(update={"embeddings": False})
        quantize(source, target, dataclasses.replace(int8, config=plain))
        return NeuralCompressorResult((evaluate(source), evaluate(target))[1:], (), True)

    def score(of: Any, path: Path) -> float:
        scored.append(has_rounded_embeddings(path))
        return 0.9

    monkeypatch.setattr(quantize_stage, "quantize_with_neural_compressor", tool)
    monkeypatch.setattr("ziplm_deploy.stages.budget.BudgetJudge.score", score)
    settings = {"variants": ["int8"], "int8": {"backend": "neural-compressor", "embeddings": embeddings}}
    started = Run(recipe(made, output_dir=str(copied.parent), compress=settings))
    [of] = started.pruned_members
    int8 = of.file(Variant.INT8)
    quantize_stage.quantize_file(started, int8)
    assert scored == [embeddings]  # the float32 file's score is known
    assert has_rounded_embeddings(int8.path) is embeddings
    assert Int8Record.load(int8.int8_record).embeddings is embeddings


def test_trained_scales_survive_a_failure_after_training(
    copied: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "variants": ["int8"],
        "train": {"mode": "distil", "max_steps": 2, "batch_size": 8},
        "int8": {"method": "qat", "n_calibration": 8},
    }
    changed = recipe(made, compress=settings, output_dir=str(copied.parent))
    with monkeypatch.context() as broken:
        broken.setattr("ziplm_deploy.stages.budget.BudgetJudge.score", lambda *a: float("nan"))
        with pytest.raises(NumericalError, match="finite score"):
            ziplm_deploy.compress(changed)
    assert list((copied / "recovery").glob("dense-int8-*/checkpoint-2"))
    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    ziplm_deploy.compress(changed, progress)
    assert any("goes on from checkpoint-2" in note for note in notes)


def test_without_evaluation_data_there_is_no_budget(copied: Path, made: Path) -> None:
    settings = {"variants": ["int8"], "int8": {"n_calibration": 8}}
    data = raw_recipe(made, compress=settings, output_dir=str(copied.parent))
    del data["data"]["evaluation"]
    ziplm_deploy.compress(parse_recipe(data))
    record = Int8Record.load(copied / "compression" / "1.5x" / "int8.json")
    assert record.within_budget is None
    assert record.fp32_linears == []
    assert record.scores == []


def test_a_budget_that_cannot_be_held_is_said(copied: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter(np.linspace(0.5, 0.4, 100))
    monkeypatch.setattr("ziplm_deploy.stages.budget.BudgetJudge.reference_score", 0.9)
    monkeypatch.setattr("ziplm_deploy.stages.budget.BudgetJudge.score", lambda self, path: float(next(scores)))
    settings = {"variants": ["int8"], "int8": {"n_calibration": 8}}
    report = run(recipe(made, compress=settings, output_dir=str(copied.parent)))
    file = report.members[1].files[1]
    assert file.facts["budget"].startswith("not held on the ")
    assert any("accuracy budget" in note for note in report.notes)


def test_a_missing_compressed_file_is_named(made: Path) -> None:
    path = member(made) / "model_int8.onnx"
    content = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(CorruptArtifactError, match="model_int8"):
            ziplm_deploy.report(recipe(made, compress=COMPRESS))
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"variants": ["int4"]}, "variants"),
        ({"target": "int8"}, "must be one of compress.variants"),
        ({"variants": ["sparse"], "sparsity": {"sparsity": 1.0}}, "sparsity"),
        ({"variants": ["sparse"], "sparsity": {"sparsity": 0.0}}, "sparsity"),
        ({"variants": ["sparse"], "sparsity": {"pattern": "2:4"}}, "pattern"),
        ({"variants": ["int8"], "int8": {"method": "qat"}}, "compress.train.mode"),
        (
            {
                "variants": ["int8"],
                "train": {"mode": "distil"},
                "int8": {"method": "qat", "backend": "neural-compressor"},
            },
            "backend: onnxruntime",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(made: Path, compress: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(made, compress=compress)


def test_dynamic_int8_is_refused_for_engines_that_do_not_run_it(made: Path) -> None:
    with pytest.raises(RecipeError, match="static or qat"):
        recipe(made, compress={"variants": ["int8"]}, environment={"engine": "openvino"})


def test_an_absent_back_end_is_found_before_any_work(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("ZIPLM_NEURAL_COMPRESSOR_PYTHON", raising=False)
    settings = {"variants": ["int8"], "int8": {"backend": "neural-compressor"}}
    with pytest.raises(EngineError, match="ziplm-deploy setup neural-compressor"):
        run(recipe(made, compress=settings, output_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs" / "tiny" / "profile.json").exists()


def test_compress_without_variants_says_what_to_name(made: Path) -> None:
    with pytest.raises(RecipeError, match=r"compress\.variants"):
        ziplm_deploy.compress(recipe(made))
