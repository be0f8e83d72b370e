"""Whole runs on workloads of several lengths, given as numbers or as texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import ziplm_deploy
from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, recipe, stamps, write_rows
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import Call, Workload, load_recipe, parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.run.workload import with_counted_lengths
from ziplm_deploy.stages.benchmark import is_benchmarked, short_requests
from ziplm_deploy.stages.profile import profile_key
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.lengths import TokenLengths

LENGTHS = {"8": 1, "24": 3, "40": 6}


pytestmark = pytest.mark.slow


def on_lengths(folder: Path, lengths: Any, **changes: Any) -> dict[str, Any]:
    raw = {**raw_recipe(folder, **changes), "environment": {"workload": {"lengths": lengths}}}
    return {**raw, "speedups": [1.2]}  # short calls are mostly what no pruning takes away


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    save_dense(folder / "model", task="text-classification")
    for name, seed in (("train", 0), ("test", 1)):
        write_rows(folder / f"{name}.jsonl", 80, seed)
    ziplm_deploy.run_recipe(parse_recipe(on_lengths(folder, LENGTHS)))
    return folder


def run_dir(folder: Path) -> Path:
    return folder / "runs" / "tiny"


def test_the_report_is_of_the_expected_latency_and_shows_each_call(finished: Path) -> None:
    report = FamilyReport.load(run_dir(finished) / "report.json")
    dense, member = report.members
    for served in (dense.served, member.served):
        assert [(call.seq_len, call.weight) for call in served.calls] == [(8, 0.1), (24, 0.3), (40, 0.6)]
    ratios = [call.speedup for call in member.served.calls]
    assert 0.8 * min(ratios) < member.served.measured_speedup < 1.25 * max(ratios)
    assert member.predicted_speedup is not None
    text = (run_dir(finished) / "report.md").read_text(encoding="utf-8")
    assert "## Calls" in text
    assert "| requests | tokens | share | dense | 1.2x |" in text
    assert f"| 1 | 24 | 30 % | {dense.served.calls[1].p50_ms:.2f} ms | {member.served.calls[1].p50_ms:.2f} ms, " in text
    assert "batch 1, 8 to 40 tokens (3 lengths, 32.0 on average)" in text
    card = (run_dir(finished) / "1.2x" / "README.md").read_text(encoding="utf-8")
    assert "| requests | tokens | share | dense | 1.2x |" in card


def test_tables_and_records_of_the_run_have_every_call(finished: Path) -> None:
    table = LatencyTable.load(run_dir(finished) / "profile.json")
    assert table.environment.workload.calls == (Call(1, 8, 0.1), Call(1, 24, 0.3), Call(1, 40, 0.6))
    assert {len(cell.timing.of_calls) for cell in table.cells} == {3}
    assert {len(whole.timing.of_calls) for whole in table.wholes} == {3}
    record = BenchmarkRecord.load(run_dir(finished) / "benchmark.json")
    for timing in record.variants:
        sums = np.array([0.1, 0.3, 0.6]) @ [call.samples_ms for call in timing.calls]
        assert timing.samples_ms == pytest.approx(sums.tolist())


def test_counts_of_the_same_shares_repeat_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    before = stamps(tmp_path)
    tenfold = on_lengths(finished, {name: 10 * weight for name, weight in LENGTHS.items()})
    run_pipeline(parse_recipe({**tenfold, "output_dir": str(tmp_path / "runs")}))
    made = {name for name, stamp in stamps(tmp_path).items() if before.get(name) != stamp}
    assert not {name for name in made if name.endswith((".onnx", "profile.json", "benchmark.json"))}


def test_other_shares_are_another_table_and_benchmark(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for lengths, is_measured in ((LENGTHS, True), ({**LENGTHS, "8": 2}, False)):
        raw = {**on_lengths(finished, lengths), "output_dir": str(tmp_path / "runs")}
        with Run(parse_recipe(raw)) as run:
            assert run.folder.is_made("profile", profile_key(run)) == is_benchmarked(run) == is_measured


def test_the_recipe_in_the_folder_has_the_counted_lengths(finished: Path) -> None:
    fields = yaml.safe_load((run_dir(finished) / "recipe.yaml").read_text(encoding="utf-8"))
    assert fields["environment"]["workload"]["lengths"] == {"8": 1.0, "24": 3.0, "40": 6.0}
    given = parse_recipe(on_lengths(finished, LENGTHS))
    assert load_recipe(run_dir(finished) / "recipe.yaml").environment == given.environment


def texts_in(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


TEXTS = ["the cat sat", "a dog ran on the mat", "the cat sat", "the tree"]  # 5, 8, 5 and 4 tokens with [CLS] and [SEP]
COUNTED = {4: 1.0, 5: 2.0, 8: 1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n".join(TEXTS) + "\n\n"),
        ("a.jsonl", "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in TEXTS)),
        ("a.jsonl", "".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS)),
    ],
)
def test_tokens_of_texts_are_counted_by_the_models_tokenizer(
    finished: Path, tmp_path: Path, name: str, content: str
) -> None:
    given = parse_recipe(on_lengths(finished, texts_in(tmp_path, name, content)))
    told: list[str] = []
    counted = with_counted_lengths(given, get_task(given.model), told.append)
    assert counted.environment.workload == Workload(lengths=COUNTED)
    assert any("4 to 8 tokens (3 lengths, 5.5 on average)" in line for line in told)
    assert with_counted_lengths(counted, get_task(given.model), told.append) is counted


def test_pairs_are_one_request_and_columns_that_the_recipe_names_are_taken(finished: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"first": text, "second": "a cat", "text": "a"}) + "\n" for text in TEXTS)
    path = texts_in(tmp_path, "a.jsonl", rows)
    given = parse_recipe(on_lengths(finished, path, data={"text_columns": ["first", "second"]}))
    counted = with_counted_lengths(given, get_task(given.model), lambda text: None)
    assert counted.environment.workload.lengths == {tokens + 3: weight for tokens, weight in COUNTED.items()}


def test_texts_that_are_cut_count_as_long_as_the_model_sees_them(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**settings, "model_max_length": 6})
    (tmp_path / "model" / "tokenizer_config.json").write_text(text, encoding="utf-8")
    path = texts_in(tmp_path, "a.txt", "\n".join(TEXTS))
    told: list[str] = []
    given = parse_recipe(on_lengths(tmp_path, path))
    counted = with_counted_lengths(given, get_task(given.model), told.append)
    assert counted.environment.workload.lengths == {4: 1.0, 5: 2.0, 6: 1.0}
    assert told[0].startswith(f"1 of 4 texts in {path} are cut to 6 tokens")


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 40), ("roberta", 38)])
def test_a_tokenizer_without_a_limit_has_the_models(model_type: str, positions: int, tmp_path: Path) -> None:
    save_dense(tmp_path / "model", model_type)
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**settings, "model_max_length": 10**30})
    (tmp_path / "model" / "tokenizer_config.json").write_text(text, encoding="utf-8")
    path = texts_in(tmp_path, "a.txt", "the cat sat\n" + "the cat sat " * 40)
    told: list[str] = []
    given = parse_recipe(on_lengths(tmp_path, path))
    counted = with_counted_lengths(given, get_task(given.model), told.append)
    assert max(counted.environment.workload.lengths) == positions
    assert told[0].startswith(f"1 of 2 texts in {path} are cut to {positions} tokens")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "expected rows in .*, found an empty data set"),
        ('{"text": "  "}\n', "found only blank ones; give a file of requests"),
        ('{"title": "a cat"}\n', "expected the text in column"),
        ('{"text": 16}\n', "expected text in column 'text', found 16 in row 1"),
        ("not json\n", "one JSON object a line"),
    ],
)
def test_files_without_texts_are_refused_before_anything_is_written(
    finished: Path, tmp_path: Path, content: str, told: str
) -> None:
    path = texts_in(tmp_path, "a.jsonl", content)
    given = parse_recipe({**on_lengths(finished, path), "output_dir": str(tmp_path / "runs")})
    with pytest.raises(DataError, match=told):
        run_pipeline(given)
    assert not (tmp_path / "runs" / "tiny" / "manifest.json").exists()


def test_lengths_beyond_the_model_are_refused_before_anything_is_measured(finished: Path, tmp_path: Path) -> None:
    given = parse_recipe({**on_lengths(finished, {"8": 1, "400": 1}), "output_dir": str(tmp_path / "runs")})
    with pytest.raises(RecipeError, match=r"lengths up to 40 tokens, to which .*model cuts texts, found 400; count"):
        run_pipeline(given)
    assert not (tmp_path / "runs" / "tiny" / "profile.json").exists()


def test_a_run_counts_texts_and_times_what_they_came_to(finished: Path, tmp_path: Path) -> None:
    texts = [" ".join(["cat"] * (int(tokens) - 2)) for tokens, count in LENGTHS.items() for _ in range(count)]
    path = texts_in(tmp_path, "a.txt", "\n".join(texts))
    shutil.copytree(finished / "runs", tmp_path / "runs")  # where these lengths were given as numbers
    measured = (tmp_path / "runs" / "tiny" / "benchmark.json").stat().st_mtime_ns
    raw = {**on_lengths(finished, path), "output_dir": str(tmp_path / "runs")}
    told: list[str] = []

    class Told(Progress):
        def note(self, text: str) -> None:
            told.append(text)

    report = run_pipeline(parse_recipe(raw), Told())
    assert [call.seq_len for call in report.members[1].served.calls] == [8, 24, 40]
    assert (tmp_path / "runs" / "tiny" / "benchmark.json").stat().st_mtime_ns == measured
    assert any("texts in" in line for line in told)
    fields = yaml.safe_load((tmp_path / "runs" / "tiny" / "recipe.yaml").read_text(encoding="utf-8"))
    assert fields["environment"]["workload"] == {"batch_size": 1, "seq_len": 40, "lengths": LENGTHS}


def test_lengths_need_no_benchmark_of_short_requests(finished: Path) -> None:
    lengths = TokenLengths(key="k", examples=9, median=5, p90=9, longest=40, limit=32, cut=1)
    folder = SimpleNamespace(lengths={"evaluation": lengths})
    given = recipe(finished, benchmark={"median_length": True})
    for raw, expected in ((given, 5), (parse_recipe({**on_lengths(finished, LENGTHS), "benchmark": {}}), None)):
        found = short_requests(SimpleNamespace(recipe=raw, folder=folder))  # type: ignore[arg-type]
        assert (found.workload.seq_len if found else None) == expected
