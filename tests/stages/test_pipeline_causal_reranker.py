"""A whole run of a language model that ranks pairs by yes and no, and of a classifier that is trained from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.pipeline import raw_recipe, written_again
from tests.helpers.reranker_models import save_reranker
from tests.helpers.search_data import ranked_rows, write_lines
from ziplm_deploy.compression.int8.quantize import quantized_linears
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_data, check_lengths

pytestmark = pytest.mark.transformers

MODEL = {
    "task": "reranking",
    "pair_prompt": "<|im_start|> {instruction} ? {query} on {document} <|im_end|> <|im_start|>",
    "instruction": "who sat",
}


def recipe(folder: Path, **changes: Any) -> Recipe:
    return parse_recipe(raw_recipe(folder, **{"model": MODEL, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and queries whose most relevant passage is the one that it scores highest itself."""
    folder = tmp_path_factory.mktemp("causal reranker")
    save_reranker(folder / "model")
    rows = ranked_rows(16)
    write_lines(folder / "train.jsonl", [{"query": row["query"], "passage": row["passage"]} for row in rows])
    write_lines(folder / "test.jsonl", rows)
    with Run(recipe(folder, output_dir=str(folder / "asked"))) as run:
        task: Any = run.task
        inputs = task.encode(run.data.evaluation_set_of(as_served=False), sort=False)
        found = [task.forward(run.dense.model, batch)["logits"][:, 0].tolist() for batch in inputs]
    scores = np.array([score for batch in found for score in batch]).reshape(16, 4)
    for row, best in zip(rows, np.eye(4, dtype=int)[scores.argmax(axis=1)].reshape(-1), strict=True):
        row["label"] = int(best)
    write_lines(folder / "test.jsonl", rows)
    return folder


@pytest.mark.slow
def test_a_model_ranks_as_it_does_itself_and_members_are_classifiers(folder: Path) -> None:
    compress = {"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}}
    changes = {"compress": compress, "recover": {"mode": "one-shot", "max_steps": 3, "batch_size": 8}}
    report = run_pipeline(recipe(folder, **changes))
    dense, member = report.members
    assert dense.served.accuracy["ndcg_at_10"] == pytest.approx(1.0)
    counted = {str(file.variant): file.of_dense["ndcg_at_10"].n_examples for file in member.files}
    assert counted == {"fp32": 16, "int8": 8}  # half of the queries chose the form of the latter
    path = folder / "runs" / "tiny" / "1.5x"
    assert type(load(path)).__name__ == "Qwen3ForSequenceClassification"
    assert len(quantized_linears(path / "model_int8.onnx")) > 3
    inputs = {"input_ids": np.array([[2, 5, 7, 3]]), "attention_mask": np.ones((1, 4), dtype=np.int64)}
    for file in ("model.onnx", "model_int8.onnx"):
        assert onnx_runner(path / file)(inputs)["logits"].shape == (1, 1)
    card = (path / "README.md").read_text()
    assert "who sat" in (path / "chat_template.jinja").read_text()
    assert "ORTModelForSequenceClassification" in card
    again = written_again(folder, recipe(folder, **changes, model={**MODEL, "instruction": "the cat"}))
    assert {"1.5x/model.onnx", "1.5x/chat_template.jinja", "dense/model.onnx", "report.json"} <= again


@pytest.mark.slow
def test_a_reranker_is_trained_from_its_answers(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ranked_rows(8))
    training = {"dense": {"train": True, "max_steps": 2, "batch_size": 8}, "output_dir": str(tmp_path / "runs")}
    changed = {"data": {"calibration": str(tmp_path / "train.jsonl"), "n_calibration": 32}, **training}
    report = run_pipeline(recipe(folder, **changed, model={**MODEL, "answer_tokens": ["cat", "dog"]}))
    config = json.loads((tmp_path / "runs" / "tiny" / "dense" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert report.members[0].served.accuracy["ndcg_at_10"] < 1


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"compress": {"variants": ["sparse"]}}, RecipeError, "compress.variants .* for the causal encoder qwen3"),
        ({"environment": {"workload": {"seq_len": 7}}}, RecipeError, "more than the 7 tokens of model.pair_prompt"),
        ({"data": {"calibration": "@texts.jsonl"}}, DataError, "whose models score a pair, found 'text'"),
        ({"environment": {"workload": {"lengths": "@texts.jsonl"}}}, DataError, "environment.workload.lengths"),
    ],
    ids=["sparse", "short", "single texts", "lengths"],
)
def test_what_cannot_be_ranked_is_refused(
    changes: dict[str, Any], error: type[Exception], said: str, folder: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "texts.jsonl", [{"text": "a dog ran"}] * 80)
    raw = json.loads(json.dumps(changes).replace("@", f"{tmp_path}/"))
    if "lengths" in str(changes):
        whole = raw_recipe(folder, model=MODEL, output_dir=str(tmp_path))
        asked = parse_recipe({**whole, "environment": raw["environment"]})
    else:
        asked = recipe(folder, **raw, output_dir=str(tmp_path))
    with pytest.raises(error, match=said):
        _check(asked)


def _check(asked: Recipe) -> None:
    with Run(asked) as run:
        check_lengths(run)
        check_data(run)


def test_lengths_of_pairs_count_the_prompt(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs.jsonl", [{"query": "who ?", "passage": "a cat"}] * 4)
    whole = raw_recipe(folder, model=MODEL, output_dir=str(tmp_path))
    lengths = {"workload": {"lengths": str(tmp_path / "pairs.jsonl")}}
    with Run(parse_recipe({**whole, "environment": lengths})) as run:
        assert run.recipe.environment.workload.seq_len == 11
