"""GGUF files of a run in llama.cpp: timed and scored beside the members' ONNX files, and what of it is refused."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.pipeline import causal_recipe, save_byte_level, written_again
from ziplm_deploy.engines import base
from ziplm_deploy.errors import EngineError, RecipeError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.tasks.record import Scores

MEASURED: dict[str, Any] = {
    "speedups": [1.1],  # far below what dropping every layer gives: timings of tiny models are noise
    "export": {"gguf": "F16"},
    "benchmark": {"engines": ["llamacpp"]},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    folder = tmp_path_factory.mktemp("llamacpp")
    save_byte_level(folder)
    run_pipeline(parse_recipe(causal_recipe(folder, **MEASURED)))
    return folder


@pytest.fixture
def run_dir(finished: Path) -> Path:
    return finished / "runs" / "tiny"


@pytest.mark.slow
def test_files_are_timed_on_every_call_of_the_same_rounds(run_dir: Path) -> None:
    record = BenchmarkRecord.load(run_dir / "benchmark.json")
    assert [timing.name for timing in record.variants] == ["dense", "1.1x", "dense F16", "1.1x F16"]
    for timing in record.variants[2:]:
        assert timing.engine == "llamacpp"
        assert timing.engine_version == importlib.metadata.version("xllamacpp")
        assert Path(timing.path).name == "model.gguf"
        assert [(call.seq_len, call.cache_length) for call in timing.calls] == [(12, 0), (1, 12), (1, 15)]
        sums = np.array([1.0, 2.0, 2.0]) @ [call.samples_ms for call in timing.calls]
        assert timing.samples_ms == pytest.approx(sums.tolist())
        assert len(timing.samples_ms) == len(record.variants[0].samples_ms)


@pytest.mark.slow
def test_scores_are_nearly_those_of_the_same_weights_in_onnx_runtime(run_dir: Path) -> None:
    for name in ("dense", "1.1x"):
        own, onnx = (Scores.load(run_dir / name / f"accuracy{part}.json") for part in ("_gguf", ""))
        assert own.engine == "llamacpp"
        assert own.examples == onnx.examples
        assert own.scores["inverse_perplexity"] == pytest.approx(onnx.scores["inverse_perplexity"], rel=1e-3)
        beside_itself = {"next_token_agreement": 1.0, "divergence": 0.0}  # the dense ONNX file is what is compared with
        for key, value in beside_itself.items():
            assert own.scores[key] == pytest.approx(onnx.scores.get(key, value), abs=0.02)
        assert own.scores["inverse_perplexity"] != onnx.scores["inverse_perplexity"]  # activations in float16


@pytest.mark.slow
def test_report_has_speedups_within_llama_cpp_and_over_onnx_runtime(run_dir: Path) -> None:
    report = FamilyReport.load(run_dir / "report.json")
    record = BenchmarkRecord.load(run_dir / "benchmark.json")
    dense, member = report.gguf
    assert (dense.member, member.member) == ("dense", "1.1x")
    assert dense.over_dense is None
    assert member.over_dense == record.ratio_between("1.1x F16", "dense F16")
    assert member.over_onnx == record.ratio_between("1.1x F16", "1.1x")
    assert member.ratio == record.variant("1.1x F16").ratio
    assert member.size_bytes == (run_dir / "1.1x" / "model.gguf").stat().st_size
    assert member.of_source is not None
    assert member.of_source.percent == pytest.approx(100.0, abs=0.2)
    assert member.of_dense["inverse_perplexity"].n_examples == 12
    low, high = member.accuracy_intervals["inverse_perplexity"]
    assert low < member.accuracy["inverse_perplexity"] < high


@pytest.mark.slow
def test_report_is_written_for_people(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    section = text.partition("## llama.cpp")[2].partition("\n## ")[0]
    scores = Scores.load(run_dir / "1.1x" / "accuracy_gguf.json").scores
    assert f"| {1 / scores['inverse_perplexity']:.2f} |" in section
    assert "over dense F16 [95 %]" in section
    assert "| next token as dense (ONNX) | KL to dense, nats a token (ONNX) |" in section
    assert f"| {scores['next_token_agreement']:.4f} | {scores['divergence']:.4f} |" in section
    assert "| 1 | 1 after 15 | 2 a request |" in section


@pytest.mark.slow
def test_other_weights_repeat_what_is_of_gguf_only(finished: Path) -> None:
    again = written_again(finished, parse_recipe(causal_recipe(finished, **MEASURED)))
    assert not {name for name in again if name.endswith((".gguf", ".onnx", "benchmark.json", "accuracy_gguf.json"))}
    changed = written_again(finished, parse_recipe(causal_recipe(finished, **{**MEASURED, "export": {"gguf": "Q8_0"}})))
    assert {"benchmark.json", "1.1x/model.gguf", "1.1x/accuracy_gguf.json", "uncertainty.json"} <= changed
    assert not {name for name in changed if name.endswith((".onnx", "accuracy.json"))}
    report = FamilyReport.load(finished / "runs" / "tiny" / "report.json")
    assert [file.name for file in report.gguf] == ["dense Q8_0", "1.1x Q8_0"]
    perplexities = [1 / file.accuracy["inverse_perplexity"] for file in report.gguf]
    assert all(math.isfinite(value) and value > 1 for value in perplexities)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"benchmark": {"engines": ["llamacpp"]}}, "expected export.gguf for benchmark.engines"),
        ({**MEASURED, "environment": {"workload": {"prefill": 12, "decode": 4, "batch_size": 2}}}, "batch_size: 1"),
        ({"benchmark": {"baseline_engine": "llamacpp"}}, "llamacpp as environment.engine and as"),
        ({**MEASURED, "benchmark": {"engines": ["openvino"]}}, "llamacpp"),
    ],
)
def test_recipes_that_cannot_work_are_refused_when_read(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_recipe(causal_recipe(tmp_path, **changes))


def test_encoders_are_refused(tmp_path: Path) -> None:
    from tests.helpers.pipeline import raw_recipe
    from ziplm_deploy.stages.checks import check_task

    with pytest.raises(RecipeError, match=r"no export\.gguf"):
        check_task(parse_recipe(raw_recipe(tmp_path, **MEASURED)))


def test_a_missing_engine_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    save_byte_level(tmp_path)
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "xllamacpp":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(base.importlib.metadata, "version", version)
    with pytest.raises(EngineError, match=r"ziplm-deploy\[llamacpp\]"):
        run_pipeline(parse_recipe(causal_recipe(tmp_path, **MEASURED)))
    assert not list((tmp_path / "runs").rglob("profile.json"))
