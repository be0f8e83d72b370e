"""Whole runs that are judged by rankings: embeddings that search, and a reranker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.models import save_dense, sentences
from tests.helpers.pipeline import raw_recipe, written_again
from tests.helpers.search_data import ranked_rows, write_lines
from tests.helpers.sentence_models import TinySentenceModel
from ziplm_deploy.cli.console import print_family
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import CorruptArtifactError, DataError, RecipeError
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Recipe, Variant, parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_data
from ziplm_deploy.stages.retrieval import cut_passages_note, score_retrieval

MODEL = TinySentenceModel(
    settings={"prompts": {"query": "who ran ? ", "passage": "the "}, "truncate_dim": 8}, normalize=True
)


def search_recipe(folder: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": {"task": "sentence-similarity"},
        "data": {"evaluation": None, "retrieval": str(folder / "search.jsonl")},
    }
    for section, values in changes.items():
        fields[section] = {**fields.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(raw_recipe(folder, **fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    MODEL.save(folder / "model")
    texts = list(dict.fromkeys(sentences(80)))
    write_lines(folder / "train.jsonl", [{"text": text} for text in texts])
    rows = [{"query": " ".join(text.split()[:3]), "passage": text} for text in texts]
    write_lines(folder / "search.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> FamilyReport:
    return run_pipeline(search_recipe(folder))


def test_dense_scores_are_those_of_its_own_embeddings(report: FamilyReport, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    queries = list(dict.fromkeys(row["query"] for row in rows))
    passages = [row["passage"] for row in rows]
    found = load_file(folder / "runs" / "tiny" / "retrieval" / "dense.safetensors")
    for name, prompt, texts in (("queries", "who ran ? ", queries), ("passages", "the ", passages)):
        expected = MODEL.embeddings(folder / "model", [prompt + text for text in texts])
        np.testing.assert_allclose(found[name], expected, atol=1e-4)
    assert report.retrieval is not None
    assert (report.retrieval.n_queries, report.retrieval.n_passages) == (len(queries), len(passages))
    values = []
    for query, vector in zip(queries, found["queries"], strict=True):
        order = np.argsort(-(found["passages"] @ vector))
        relevant = [row["query"] == query for row in rows]
        gains = [float(relevant[index]) / np.log2(rank + 2) for rank, index in enumerate(order[:10])]
        best = sum(1 / np.log2(rank + 2) for rank in range(min(10, sum(relevant))))
        values.append(sum(gains) / best)
    dense = report.retrieval.files["dense"]
    assert dense.scores["ndcg_at_10"] == pytest.approx(np.mean(values))
    assert dense.scores["asymmetric_ndcg_at_10"] == dense.scores["ndcg_at_10"]
    assert dense.of_dense == {}


def test_members_are_scored_both_ways_and_cut(report: FamilyReport, folder: Path) -> None:
    assert report.retrieval is not None
    member = report.retrieval.files["1.5x"]
    assert set(member.scores) == set(member.intervals) == set(member.of_dense)
    assert {"ndcg_at_10_first_8", "asymmetric_ndcg_at_10_first_8"} < set(member.scores)
    for metric, (low, high) in member.intervals.items():
        assert 0 <= low <= high <= 1
        assert member.of_dense[metric].n_examples == report.retrieval.n_queries
    assert member.scores["ndcg_at_10"] != member.scores["asymmetric_ndcg_at_10"]
    run_folder = folder / "runs" / "tiny"
    for page in (run_folder / "report.md", run_folder / "1.5x" / "README.md"):
        text = page.read_text()
        assert "## Retrieval" in text
        assert f"| 1.5x | first 8 | {member.scores['ndcg_at_10_first_8']:.4f} [" in text
    assert 'model = SentenceTransformer("1.5x", backend="onnx"' in text  # of the card
    assert FamilyReport.load(run_folder / "report.json").retrieval == report.retrieval


def test_other_prompts_reach_members_that_stay(report: FamilyReport, folder: Path, tmp_path: Path) -> None:
    """No stage that writes a member runs again for them, and none for the files that were written anew."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    asked = search_recipe(folder, model={"query_prompt": "where ? "}, output_dir=str(tmp_path / "runs"))
    for _ in range(2):
        run_pipeline(asked)
        run_folder = tmp_path / "runs" / "tiny"
        for member in ("dense", "1.5x"):
            said = json.loads((run_folder / member / "config_sentence_transformers.json").read_text())["prompts"]
            assert (said["query"], said["document"]) == ("where ? ", "the ")
        before, after = (
            json.loads((place / "tiny" / "manifest.json").read_text())["seconds"]
            for place in (folder / "runs", tmp_path / "runs")
        )
        changed = {name for name, spent in after.items() if spent != before.get(name)}
        assert not {name for name in changed if name.startswith(("export", "prune", "recover", "calibrate"))}


def test_the_console_shows_what_is_found_and_cut_passages_are_noted(
    report: FamilyReport, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_family(report, folder)
    shown = "".join(capsys.readouterr())
    assert f"nDCG@10 of {report.retrieval.n_queries} queries" in shown  # type: ignore[union-attr]
    assert not any("data.retrieval" in note for note in report.notes)
    with Run(search_recipe(folder, environment={"workload": {"seq_len": 6}}, output_dir=str(tmp_path))) as run:
        note = cut_passages_note(run)
    assert note is not None
    assert "are longer than 6 tokens and were cut" in note


def test_passages_may_be_longer_than_queries(report: FamilyReport, folder: Path, tmp_path: Path) -> None:
    short = {"environment": {"workload": {"seq_len": 6}}, "output_dir": str(tmp_path)}
    with Run(search_recipe(folder)) as plain, Run(search_recipe(folder, data={"passage_length": 32}, **short)) as run:
        assert cut_passages_note(run) is None
        assert run.data.retrieval_key != plain.data.retrieval_key
        runner = onnx_runner(folder / "runs" / "tiny" / "dense" / "model.onnx")
        how, whole = (each.data.passages_taken_by(Variant.FP32) for each in (run, plain))
        found, expected = run.data.retrieval.embed_own(runner, how), plain.data.retrieval.embed_own(runner, whole)
    np.testing.assert_allclose(found["passages"], expected["passages"], atol=1e-6)
    assert np.abs(found["queries"] - expected["queries"]).max() > 1e-3, "queries are cut"
    with (
        Run(search_recipe(folder, data={"passage_length": 4096}, **short)) as run,
        pytest.raises(RecipeError, match=r"expected data\.passage_length up to \d+ tokens, .* found 4096"),
    ):
        check_data(run)
    for changes in ({"data": {"retrieval": None}}, {"export": {"shapes": "static"}}):
        data = {"passage_length": 32, **changes.get("data", {})}
        with pytest.raises(RecipeError, match=r"expected data\.retrieval and export\.shapes: dynamic beside"):
            search_recipe(folder, **{**changes, "data": data})


def test_only_what_changed_is_searched_again(report: FamilyReport, folder: Path) -> None:
    assert not [name for name in written_again(folder, search_recipe(folder)) if "retrieval" in name]
    again = written_again(folder, search_recipe(folder, data={"n_retrieval": 20}))
    made = {name for name in again if "retrieval" in name}
    assert made == {
        "retrieval.json",
        *(f"retrieval/{name}" for name in ("dense.safetensors", "dense.json", "1.5x.json")),
    }
    assert not any(name.endswith(".onnx") for name in again)
    prompts = json.loads((folder / "runs" / "tiny" / "1.5x" / "config_sentence_transformers.json").read_text())[
        "prompts"
    ]
    assert prompts == {**MODEL.settings["prompts"], "document": MODEL.settings["prompts"]["passage"]}
    (folder / "runs" / "tiny" / "retrieval" / "1.5x.json").unlink()
    damaged = folder / "runs" / "tiny" / "retrieval" / "dense.safetensors"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    with (
        Run(search_recipe(folder, data={"n_retrieval": 20})) as run,
        pytest.raises(CorruptArtifactError, match="dense"),
    ):
        score_retrieval(run)


def test_search_that_cannot_be_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sentence-similarity for data\.retrieval"):
        search_recipe(folder, model={"task": "text-classification"})
    elsewhere = {"output_dir": str(tmp_path)}
    with (
        Run(search_recipe(folder, model={"dimensions": [64]}, **elsewhere)) as run,
        pytest.raises(RecipeError, match=r"model\.dimensions up to 32, .*found 64"),
    ):
        check_data(run)
    with (
        Run(search_recipe(folder, data={"retrieval": str(folder / "train.jsonl")}, **elsewhere)) as run,
        pytest.raises(DataError, match=r"train\.jsonl: .*query and passage"),
    ):
        check_data(run)


def test_prompts_of_the_recipe_are_refused_by_a_pooling_that_leaves_them_out(folder: Path, tmp_path: Path) -> None:
    TinySentenceModel({"pooling_mode": "mean", "include_prompt": False}).save(tmp_path / "model")
    model = {"path": str(tmp_path / "model"), "query_prompt": "who "}
    with (
        Run(search_recipe(folder, model=model, output_dir=str(tmp_path))) as run,
        pytest.raises(RecipeError, match="include_prompt: false"),
    ):
        check_data(run)


@pytest.mark.slow
def test_a_reranker_is_pruned_trained_and_ranked(tmp_path: Path) -> None:
    save_dense(tmp_path / "model", task="text-regression")
    rows = ranked_rows(16)
    write_lines(tmp_path / "train.jsonl", [{"query": row["query"], "passage": row["passage"]} for row in rows])
    write_lines(tmp_path / "test.jsonl", rows)
    recover = {"mode": "one-shot", "max_steps": 2, "batch_size": 8}
    compress = {"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}}
    changes: dict[str, Any] = {"recover": recover, "compress": compress, "model": {"task": "reranking"}}
    dense, member = run_pipeline(parse_recipe(raw_recipe(tmp_path, **changes))).members
    assert set(dense.served.accuracy) == {"ndcg_at_10", "mrr_at_10"}
    for file in member.files:
        assert -1 <= file.accuracy["score_correlation"] <= 1
        chose = 8 if file.variant.is_int8 else 0  # queries that the form of the file was taken by
        assert file.of_dense["ndcg_at_10"].n_examples == 16 - chose
    assert "Scores are on 16 queries" in (tmp_path / "runs" / "tiny" / "report.md").read_text()
    card = (tmp_path / "runs" / "tiny" / "1.5x" / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card
    assert "ORTModelForSequenceClassification" in card
    assert 'model = CrossEncoder("1.5x", backend="onnx", model_kwargs={"file_name": "model' in card
