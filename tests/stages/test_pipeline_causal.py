"""The whole way of a causal language model: table of prefill and decode, files with a cache, benchmark, report."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers.models import VOCABULARY, random_entries, tiny_causal_model, tiny_tokenizer
from tests.helpers.pipeline import causal_recipe, save_causal, written_again
from ziplm_deploy import load_runner
from ziplm_deploy.compression.int8.quantize import quantized_linears
from ziplm_deploy.compression.int8.weight_only import weight_only_linears
from ziplm_deploy.compression.records import Int8Record, LinearRanking
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.member_files import load
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.benchmark import is_benchmarked
from ziplm_deploy.stages.checks import check_lengths
from ziplm_deploy.stages.export import export_dense, fits_stock_optimum
from ziplm_deploy.stages.profile import profile_key
from ziplm_deploy.stages.report import ort_class_of
from ziplm_deploy.tasks.record import Continuations, Scores

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    save_causal(folder)
    run_pipeline(parse_recipe(causal_recipe(folder)))
    return folder


@pytest.fixture
def run_dir(finished: Path) -> Path:
    return finished / "runs" / "tiny"


def test_table_and_benchmark_have_a_column_a_call(run_dir: Path) -> None:
    table = LatencyTable.load(run_dir / "profile.json")
    calls = table.environment.workload.calls
    assert [(call.seq_len, call.cache_length, call.weight) for call in calls] == [
        (12, 0, 1.0),
        (1, 12, 2.0),
        (1, 15, 2.0),
    ]
    for timing in (table.dense, table.base, *(cell.timing for cell in table.cells)):
        each = [own.median_ms for own in timing.of_calls]
        assert timing.median_ms == pytest.approx(each[0] + 2 * each[1] + 2 * each[2])
    record = BenchmarkRecord.load(run_dir / "benchmark.json")
    for variant in record.variants:
        assert [call.cache_length for call in variant.calls] == [0, 12, 15]
        sums = np.array([1.0, 2.0, 2.0]) @ [call.samples_ms for call in variant.calls]
        assert variant.samples_ms == pytest.approx(sums.tolist())


def test_scores_are_the_perplexity_of_the_file_itself(finished: Path, run_dir: Path) -> None:
    member = load(run_dir / "1.5x")
    ids = tiny_tokenizer(finished / "again")((finished / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 12 * 16]).reshape(12, 16)
    with torch.no_grad():
        loss = float(member(input_ids=windows, labels=windows).loss)
    scores = Scores.load(run_dir / "1.5x" / "accuracy.json").scores
    assert scores["inverse_perplexity"] == pytest.approx(math.exp(-loss), rel=1e-4)
    assert {"next_token_accuracy", "next_token_agreement", "divergence"} <= scores.keys()


def test_members_continue_texts_as_torch_does(run_dir: Path) -> None:
    runner, member = load_runner(run_dir / "1.5x"), load(run_dir / "1.5x")
    ids = list(runner.tokenizer.encode("the cat sat").ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(member(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    continued = itertools.takewhile(lambda token: token not in runner.end_ids, ids[-6:])
    expected = runner.tokenizer.decode(list(continued))
    assert runner.generate("the cat sat", max_new_tokens=6) == expected


def test_files_have_the_caches_of_their_own_heads(run_dir: Path) -> None:
    session = onnxruntime.InferenceSession(str(run_dir / "1.5x" / "model.onnx"), providers=["CPUExecutionProvider"])
    kept = load(run_dir / "1.5x").ziplm_kept
    heads = {f"present.{layer}.key": len(kept[f"{layer}.attention"]) for layer in range(3)}
    found = {entry.name: entry.shape[1] for entry in session.get_outputs() if entry.name.endswith(".key")}
    assert found == {name: count for name, count in heads.items() if count}


def test_report_tells_of_the_workload(run_dir: Path) -> None:
    report = FamilyReport.load(run_dir / "report.json")
    assert report.environment.workload.prefill == 12
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "12 tokens of prompt and 4 generated" in text
    assert "of a whole request" in text
    assert "| 1 | 1 after 15 | 2 a request |" in text


def test_report_shows_perplexity_and_what_models_write(run_dir: Path) -> None:
    written = Continuations.load(run_dir / "1.5x" / "continuations.json")
    runner = load_runner(run_dir / "1.5x")
    assert len(written.prompts) == len(written.texts) == 3
    assert written.texts == [runner.generate(prompt, max_new_tokens=13) for prompt in written.prompts]
    report = FamilyReport.load(run_dir / "report.json")
    assert report.members[1].continued == dict(zip(written.prompts, written.texts, strict=True))
    perplexity = 1 / report.members[1].served.accuracy["inverse_perplexity"]
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert f"1.5x {perplexity:.2f}" in text
    assert "Perplexity of windows of 16 tokens, 16 apart: dense" in text
    assert f"> {written.prompts[0]}" in text


def test_the_card_opens_the_member_with_what_it_prints(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    card = (run_dir / "1.5x" / "README.md").read_text(encoding="utf-8")
    assert "ORTModelForCausalLM" not in card  # layers may keep other numbers of heads
    for code in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        exec(code.replace("max_new_tokens=40", "max_new_tokens=4"), {})
    assert "load_runner" in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"context": 65}}, r"expected data\.context up to 40 tokens, .* found 65"),
        ({"data": {"context": 16, "stride": 17}}, r"expected data\.stride up to data\.context \(16 tokens\), found 17"),
        (
            {"environment": {"workload": {"prefill": 60, "decode": 5}}},
            r"expected environment\.workload within 64 tokens, .* found 65",
        ),
    ],
)
def test_windows_and_requests_beyond_the_model_are_refused(changes: Any, said: str, tmp_path: Path) -> None:
    save_causal(tmp_path, max_position_embeddings=64)
    with Run(parse_recipe(causal_recipe(tmp_path, **changes))) as run, pytest.raises(RecipeError, match=said):
        check_lengths(run)


def test_windows_are_as_long_as_a_small_model_takes_unless_asked_otherwise(tmp_path: Path) -> None:
    save_causal(tmp_path, max_position_embeddings=24)  # its tokenizer allows 40
    with Run(parse_recipe(causal_recipe(tmp_path, data={"context": None}))) as run:
        check_lengths(run)
        assert {len(row["input_ids"]) for row in run.data.evaluation_rows} == {24}


def test_every_token_that_ends_a_chat_stays_with_a_member(tmp_path: Path) -> None:
    save_causal(tmp_path, eos_token_id=3)
    AutoTokenizer.from_pretrained(tmp_path / "model", eos_token="mat").save_pretrained(tmp_path / "model")
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [3, 7]}), encoding="utf-8")
    with Run(parse_recipe(causal_recipe(tmp_path))) as run:
        export_dense(run)
        folder = run.dense_member.folder
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [3, 7, VOCABULARY.index("mat")]
    assert load_runner(folder).end_ids == {3, 7, VOCABULARY.index("mat")}


def test_stock_optimum_is_told_of_only_where_it_can_load_the_files(tmp_path: Path) -> None:
    save_causal(tmp_path)
    with Run(parse_recipe(causal_recipe(tmp_path, export={"stock_optimum": True}))) as run:
        export_dense(run)
        session = onnxruntime.InferenceSession(run.dense_member.folder / "model.onnx")
        assert ort_class_of(run) == "ORTModelForCausalLM"
    (key,) = (entry for entry in session.get_inputs() if entry.name == "past_key_values.0.key")
    assert not isinstance(key.shape[1], int)


def test_a_table_is_of_files_for_stock_optimum_or_of_others(finished: Path) -> None:
    with Run(parse_recipe(causal_recipe(finished, export={"stock_optimum": True}))) as run:
        assert not run.folder.is_made("profile", profile_key(run))


@pytest.mark.parametrize(
    ("model_type", "sizes", "fits"),
    [
        ("llama", {}, True),
        ("llama", {"0.attention": 0, "1.ffn": 24}, True),  # a layer without a cache asks for none
        (
            "llama",
            {f"{layer}.attention": 1 for layer in range(3)},
            False,
        ),  # every layer keeps one of two: alike, and not what config.json says
        ("qwen3", {}, False),  # of heads wider than hidden_size / num_attention_heads
    ],
)
def test_stock_optimum_starts_with_the_heads_of_the_configuration(
    model_type: str, sizes: dict[str, int], fits: bool
) -> None:
    dense = tiny_causal_model(model_type)
    assert fits_stock_optimum(resize(dense, random_entries(dense, sizes)) if sizes else dense) == fits


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    changed = written_again(finished, parse_recipe(causal_recipe(finished)))
    assert not {name for name in changed if name.endswith((".onnx", ".safetensors", "profile.json", "benchmark.json"))}


def test_longer_answers_are_timed_anew(finished: Path) -> None:
    longer = causal_recipe(finished, environment={"workload": {"prefill": 12, "decode": 8}})
    for raw, is_measured in ((causal_recipe(finished), True), (longer, False)):
        with Run(parse_recipe(raw)) as run:
            assert run.folder.is_made("profile", profile_key(run)) == is_benchmarked(run) == is_measured


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose member was trained, with files in INT8."""
    folder = tmp_path_factory.mktemp("causal-trained")
    save_causal(folder, "gpt2")
    training = {"mode": "one-shot", "max_steps": 40, "batch_size": 4, "learning_rate": 2e-3, "task_weight": 0.1}
    compress = {"variants": ["int8"], "int8": {"max_loss": 0.02, "weight_only_4": ["*.feed_forward.up"]}}
    search = {"search": {"context": 8}}
    benchmark = {"baselines": ["torch", "dense-trained-on"]}
    changes = {"recover": training, "compress": compress, "prune": search, "benchmark": benchmark}
    run_pipeline(parse_recipe(causal_recipe(folder, **changes)))
    return folder / "runs" / "tiny"


@pytest.mark.slow
def test_requests_are_compared_with_those_in_torch(trained: Path) -> None:
    report = FamilyReport.load(trained / "report.json")
    assert {baseline.name for baseline in report.baselines} == {"torch", "dense-trained-on"}
    for baseline in report.baselines:
        requests = [[call.seq_len for call in each.calls] for each in (baseline, report.members[0].served)]
        assert requests[0] == requests[1]
    assert not any("add dense-trained-on" in note for note in report.notes)
    assert all(file.over_torch is not None for member in report.members for file in member.files)


@pytest.mark.slow
def test_members_learn_from_the_dense_model(trained: Path) -> None:
    record = TrainingRecord.load(trained / "1.5x" / "training.json")
    assert record.steps == 40
    assert record.losses[-1][1] < 0.95 * record.losses[0][1]
    assert "before training" in (trained / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_trained_members_are_read_as_they_were_saved(trained: Path) -> None:
    ids = np.arange(5, 17).reshape(1, 12)
    answer = onnx_runner(trained / "1.5x" / "model.onnx")({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with torch.no_grad():
        expected = load(trained / "1.5x")(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(answer["logits"] - expected).max() < 1e-3


@pytest.mark.slow
def test_int8_files_are_scored_as_they_are(trained: Path) -> None:
    folder = trained / "1.5x"
    record = Int8Record.load(trained / "compression" / "1.5x" / "int8.json")
    assert record.method == "dynamic"
    assert {"head", "layers.0.attention.qkv"} <= {row.name for row in record.sensitivities}
    names, others = {row.name for row in record.sensitivities}, set(record.fp32_linears) | record.weight_only.keys()
    assert set(quantized_linears(folder / "model_int8.onnx")) == names - others
    assert weight_only_linears(folder / "model_int8.onnx") == record.weight_only
    asked = {name for name in names if name.endswith("feed_forward.up")}
    assert asked <= others
    assert asked >= {name for name, bits in record.weight_only.items() if bits == 4}
    report = FamilyReport.load(trained / "report.json")
    facts = next(file for file in report.members[1].files if file.file == "model_int8.onnx").facts
    for bits in set(record.weight_only.values()):
        count = list(record.weight_only.values()).count(bits)
        assert facts[f"weight-only {bits}-bit"] == f"{count} of {len(names)} linears"
    before, after = (Scores.load(folder / name).scores for name in ("accuracy.json", "accuracy_int8.json"))
    assert after["inverse_perplexity"] == pytest.approx(before["inverse_perplexity"], rel=0.05)
    assert after["divergence"] != before["divergence"]
    names = {variant.name for variant in BenchmarkRecord.load(trained / "benchmark.json").variants}
    assert {"dense", "dense int8", "1.5x", "1.5x int8"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "qwen3"])
def test_every_type_goes_the_whole_way(model_type: str, tmp_path: Path) -> None:
    """Pruned, exported, in INT8, timed, scored and reported; what tensors look like inside differs between them."""
    save_causal(tmp_path, model_type)
    compress = {"variants": ["int8"], "int8": {"max_loss": 0.5}}
    report = run_pipeline(parse_recipe(causal_recipe(tmp_path, compress=compress, benchmark={"baselines": []})))
    assert [[file.file for file in member.files] for member in report.members] == [
        ["model.onnx", "model_int8.onnx"]
    ] * 2
    assert all(np.isfinite(file.accuracy["inverse_perplexity"]) for each in report.members for file in each.files)
    ranking = LinearRanking.load(tmp_path / "runs" / "tiny" / "compression" / "1.5x" / "linears.json")
    record = Int8Record.load(tmp_path / "runs" / "tiny" / "compression" / "1.5x" / "int8.json")
    assert record.smoothing == ranking.smoothing


def test_too_little_text_to_train_on_is_found_at_once(tmp_path: Path) -> None:
    save_causal(tmp_path)
    training = {"mode": "one-shot", "max_steps": 2, "batch_size": 512}
    with pytest.raises(DataError, match="expected at least one batch of 512 training examples"):
        run_pipeline(parse_recipe(causal_recipe(tmp_path, recover=training)))
