"""The whole way with llama.cpp as the engine: its own table, GGUF files and no others, scores and benchmark there."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import gguf, gguf_layers
from tests.helpers.pipeline import causal_recipe, raw_recipe, save_byte_level, save_causal, written_again
from ziplm_deploy import load_runner
from ziplm_deploy.errors import CorruptArtifactError, ParityError, RecipeError, UnsupportedModelError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import export_as_served, export_key, export_to_be_timed, gguf_difference
from ziplm_deploy.stages.profile import profile_key, table_request
from ziplm_deploy.tasks.record import Continuations, Scores

REQUESTS = {"prefill": 12, "decode": 4}
IN_LLAMA_CPP: dict[str, Any] = {
    "speedups": [1.1],  # far below what dropping every layer gives: timings of tiny models are noise
    "environment": {"engine": "llamacpp", "workload": REQUESTS},
    "export": {"gguf": "F16"},
    "recover": {"mode": "one-shot", "max_steps": 2, "batch_size": 4},
    "benchmark": {"baselines": None},  # as by default; none is made of GGUF files
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    folder = tmp_path_factory.mktemp("llamacpp")
    # Layers, and not the server around them, take most of the time.
    save_byte_level(folder, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    run_pipeline(parse_recipe(causal_recipe(folder, **IN_LLAMA_CPP)))
    return folder


@pytest.fixture
def run_dir(finished: Path) -> Path:
    return finished / "runs" / "tiny"


@pytest.mark.slow
def test_table_is_of_gguf_files_in_llama_cpp(run_dir: Path) -> None:
    table = LatencyTable.load(run_dir / "profile.json")
    assert (table.engine, table.engine_version) == ("llamacpp", importlib.metadata.version("xllamacpp"))
    assert (table.baseline_engine, table.unpruned) == ("llamacpp", None)
    assert (table.variant, table.form) == ("gguf", "F16 weights, F16 embedding and head")
    assert table.sizes("ffn") == [0, 32, 64, 128, 256, 512]
    assert [len(cell.timing.of_calls) for cell in table.cells] == [3] * len(table.cells)


@pytest.mark.slow
def test_members_are_gguf_files_and_nothing_else(run_dir: Path) -> None:
    assert not list(run_dir.rglob("*.onnx"))
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*.gguf")}
    assert files == {"dense/model.gguf", "1.1x/model.gguf", "pruning/1.1x/model.gguf"}


@pytest.mark.slow
def test_speedups_are_over_the_dense_gguf_file(run_dir: Path) -> None:
    record = BenchmarkRecord.load(run_dir / "benchmark.json")
    assert [(timing.name, timing.engine) for timing in record.variants] == [("dense", "llamacpp"), ("1.1x", "llamacpp")]
    assert {Path(timing.path).name for timing in record.variants} == {"model.gguf"}
    member = FamilyReport.load(run_dir / "report.json").members[1]
    assert member.predicted_speedup == PruningPlan.load(run_dir / "pruning" / "1.1x.json").predicted_speedup
    assert member.served.measured_speedup == record.variant("1.1x").speedup
    in_loop = BenchmarkRecord.load(run_dir / "pruning" / "benchmark-of-dense.json")
    assert in_loop.variant("1.1x").engine == "llamacpp"


@pytest.mark.slow
def test_scores_are_llama_cpps_own_and_near_torch(finished: Path, run_dir: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(finished / "model")((finished / "text.txt").read_text())["input_ids"]
    windows = torch.tensor(ids[: 12 * 16]).reshape(12, 16)
    for name in ("dense", "1.1x"):
        scores = Scores.load(run_dir / name / "accuracy_gguf.json")
        assert (scores.engine, scores.engine_version) == ("llamacpp", importlib.metadata.version("xllamacpp"))
        with torch.no_grad():
            loss = float(load(run_dir / name)(input_ids=windows, labels=windows).loss)
        assert scores.scores["inverse_perplexity"] == pytest.approx(math.exp(-loss), rel=5e-3)
    assert {"next_token_agreement", "divergence"} <= scores.scores.keys()


@pytest.mark.slow
def test_members_continue_texts_in_llama_cpp(run_dir: Path) -> None:
    written = Continuations.load(run_dir / "dense" / "continuations.json")
    from transformers import AutoTokenizer

    model, tokenizer = load(run_dir / "dense"), AutoTokenizer.from_pretrained(run_dir / "dense")
    ids = list(tokenizer(written.prompts[0])["input_ids"])
    start = len(ids)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert written.texts[0].startswith(tokenizer.decode(ids[start:]))


@pytest.mark.slow
def test_report_and_card_say_what_was_measured(run_dir: Path) -> None:
    report = FamilyReport.load(run_dir / "report.json")
    assert report.baselines == []
    assert any("nothing stock is made for text-generation beside files of llama.cpp" in note for note in report.notes)
    assert [member.served.facts["weights"] for member in report.members] == ["F16", "F16"]
    sizes = [(run_dir / member.name / "model.gguf").stat().st_size for member in report.members]
    assert [member.served.onnx_bytes for member in report.members] == sizes
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "| GGUF MB |" in text
    assert "Dense is the model with F16 weights, as the members have them, on llamacpp" in text
    assert "Scores are those of the GGUF files themselves." in text
    assert "## llama.cpp" not in text  # that part is of files beside those of another engine
    card = (run_dir / "1.1x" / "README.md").read_text(encoding="utf-8")
    assert "library_name: llama.cpp" in card
    assert "llama-cli -m 1.1x/model.gguf" in card
    assert "optimum" not in card


@pytest.mark.slow
def test_a_member_for_llama_cpp_says_so_where_onnx_is_asked_for(run_dir: Path) -> None:
    with pytest.raises(CorruptArtifactError, match=r"expected model\.onnx .*run its model\.gguf in llama\.cpp"):
        load_runner(run_dir / "1.1x")


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_other_weights_are_another_run(finished: Path) -> None:
    again = written_again(finished, parse_recipe(causal_recipe(finished, **IN_LLAMA_CPP)))
    assert not {name for name in again if name.endswith((".gguf", "profile.json", "benchmark.json", ".safetensors"))}
    for file_type, is_made in (("F16", True), ("Q4_0", False)):
        with Run(parse_recipe(causal_recipe(finished, **{**IN_LLAMA_CPP, "export": {"gguf": file_type}}))) as run:
            assert run.folder.is_made("profile", profile_key(run)) == is_made
            assert run.folder.is_made("export dense", export_key(run, run.dense.hash)) == is_made
            assert table_request(run).served.description.startswith(f"{file_type} weights")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"export": {}}, "expected export.gguf for environment.engine: llamacpp"),
        ({"environment": {"engine": "llamacpp", "workload": {"batch_size": 2, **REQUESTS}}}, "batch_size: 1"),
        ({"compress": {"variants": ["int8"]}}, "nothing about ONNX files .*compress.variants"),
        ({"export": {"gguf": "F16", "genai": True}}, "nothing about ONNX files .*export.genai"),
        ({"export": {"gguf": "F16", "cache_form": "portable"}}, "nothing about ONNX files .*export.cache_form"),
        ({"export": {"gguf": "F16", "shapes": "static"}}, "nothing about ONNX files .*export.shapes"),
        ({"benchmark": {"engines": ["llamacpp"]}}, "nothing about ONNX files .*benchmark.engines"),
        ({"benchmark": {"baseline_engine": "onnxruntime"}}, "found llamacpp and onnxruntime"),
        ({"compress": {"variants": ["gguf"]}}, "leave gguf out"),
    ],
)
def test_recipes_that_cannot_work_are_refused_when_read(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_recipe(causal_recipe(tmp_path, **{**IN_LLAMA_CPP, **changes}))


def test_encoders_are_refused_when_the_recipe_is_read(tmp_path: Path) -> None:
    engine = {"engine": "llamacpp", "workload": {"seq_len": 12}}
    with pytest.raises(RecipeError, match=r"text-generation for environment\.engine: llamacpp"):
        parse_recipe(raw_recipe(tmp_path, environment=engine, export={"gguf": "F16"}))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_models_that_the_format_cannot_hold_are_refused_at_once(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    save_causal(tmp_path, model_type)
    with pytest.raises(UnsupportedModelError, match=r"GGUF, arch deci.*choose another environment\.engine"):
        run_pipeline(parse_recipe(causal_recipe(tmp_path, **IN_LLAMA_CPP)))
    assert not list((tmp_path / "runs").rglob("profile.json"))


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_0"])
def test_files_answer_as_torch_with_their_rounded_weights_or_are_refused(
    file_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    save_byte_level(tmp_path)
    path = tmp_path / "model.gguf"
    with Run(parse_recipe(causal_recipe(tmp_path, **{**IN_LLAMA_CPP, "export": {"gguf": file_type}}))) as run:
        run.gguf_export.write(run.dense.model, path, "dense")
        assert 0 < gguf_difference(run, run.dense.model, path) < (0.002 if file_type == "F16" else 0.05)
        export_to_be_timed(run, run.dense.model, tmp_path / "timed.gguf", "draft")
        assert gguf_difference(run, run.dense.model, tmp_path / "timed.gguf") < 0.05  # its tokens alone mean nothing
        first = lambda layers, *sizes: gguf_layers.file_layers(layers[:1], *sizes)  # noqa: E731
        monkeypatch.setattr(gguf, "file_layers", first)  # and no further ones
        with pytest.raises(ParityError, match=r"expected dense as GGUF to answer .* within [15]0 %"):
            export_as_served(run, run.dense.model, path, "dense")
        assert not path.exists()
