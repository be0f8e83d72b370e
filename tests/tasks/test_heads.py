"""New heads that fit labelled data, and the task of scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import NUM_LABELS, labelled_rows, save_dense
from ziplm_deploy.errors import DataError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import get_task

# new heads


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 2, 1], ["0", "1", "2"]),
        (["0", "1", "3"], ["0", "1", "2", "3"]),  # from CSV; no example of class 2 was drawn
        ([1.0, 0.0], ["0", "1"]),
        (["pos", "neg ", "neg"], ["neg", "pos"]),
        (["1 star", "2"], ["1 star", "2"]),
    ],
)
def test_a_new_head_has_the_classes_of_the_data(labels: list[Any], names: list[str]) -> None:
    task = get_task("text-classification")
    rows = [{"text": "a", "label": label} for label in labels]
    settings = task.head_settings(rows)
    config = transformers.AutoConfig.for_model("bert", **settings)
    assert config.num_labels == len(names)
    assert [config.id2label[index] for index in range(len(names))] == names
    for row, label in zip(task.check_labels(rows, config), labels, strict=True):
        assert names[row["label"]] == (label.strip() if isinstance(label, str) else str(int(label)))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 1], r"two or more classes .* found \['1'\]"),
        (["1", "1.0"], "two or more classes"),
        (["a", "a "], r"two or more classes .* found \['a'\]"),
        ([-1, 0, 1], r"class numbers from 0 .* found -1 to 1"),
        ([0, 10**9], "at most 9999, found 0 to 1000000000"),
        ([0.5, 1.0], "found also 0.5.*text-regression"),
        (["0.5", "1"], "found also '0.5'"),
        ([0, "a"], "found also 0"),
    ],
)
def test_labels_that_make_no_head(labels: list[Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        get_task("text-classification").head_settings([{"text": "a", "label": label} for label in labels])


def test_a_new_head_is_of_no_older_problem_type(tmp_path: Path) -> None:
    save_dense(tmp_path, task="text-regression", problem_type="regression")
    task = get_task("text-classification")
    settings = task.head_settings([{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}])
    model, _ = load_dense(ModelConfig(path=str(tmp_path), task="text-classification"), settings)
    assert (model.config.num_labels, model.config.problem_type) == (2, None)
    assert get_task("reranking").head_settings([{"label": 0.0}, {"label": 1.0}])["problem_type"] is None


def test_heads_of_the_other_tasks() -> None:
    tagged = [{"words": ["a", "b"], "label": ["O", "B-X"]}, {"words": ["c"], "label": ["I-X"]}]
    assert get_task("token-classification").head_settings(tagged)["id2label"] == {0: "B-X", 1: "I-X", 2: "O"}
    scored = labelled_rows("text-regression", 2)
    assert get_task("text-regression").head_settings(scored) == {"num_labels": 1, "problem_type": "regression"}
    assert get_task("question-answering").head_settings(labelled_rows("question-answering", 2)) == {}
    assert get_task("fill-mask").head_settings([{"text": "a"}]) == {}
    with pytest.raises(DataError, match="embeddings from labels is not supported"):
        get_task("sentence-similarity").head_settings(labelled_rows("sentence-similarity", 2))


@pytest.mark.parametrize("name", [*NUM_LABELS, "question-answering"])
def test_a_head_needs_labels(name: str) -> None:
    for rows in ([], [{"text": "a"}, {"text": "b"}]):
        with pytest.raises(DataError, match=r"labelled training data .* data\.label_column"):
            get_task(name).head_settings(rows)


# regression


def test_spearman_of_a_run_that_knows_the_order(tokenizer: Any) -> None:
    task, rows = get_task("text-regression"), labelled_rows("text-regression", 17)
    scores = {
        tuple(tokenizer(row["text"], row["text_pair"], truncation=True, max_length=36)["input_ids"]): row["label"]
        for row in rows
    }

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = [
            scores[tuple(ids[mask == 1].tolist())]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return {"logits": np.exp(np.array(known, np.float32))[:, None]}

    found = task.evaluate(run, evaluation_set(rows, tokenizer, pad_to=36))
    assert found["spearman"] == pytest.approx(1)
    assert 0.5 < found["pearson"] < 0.999
    with pytest.raises(DataError, match="differing scores"):
        task.evaluate(run, evaluation_set([{**row, "label": 1.0} for row in rows], tokenizer))


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_collapsed_model_has_no_correlation(value: float, tokenizer: Any) -> None:
    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.full((len(inputs["input_ids"]), 1), value, np.float32)}

    data = evaluation_set(labelled_rows("text-regression", 9), tokenizer)
    assert get_task("text-regression").evaluate(run, data) == {"spearman": 0.0, "pearson": 0.0}


def test_regression_keeps_the_scale_of_the_data() -> None:
    task = get_task("text-regression")
    raw = [{"sentence1": "a", "sentence2": "b", "score": "3.8"}, {"sentence1": "a", "sentence2": "b", "score": 5}]
    rows = task.normalize_rows(raw, DataConfig(), "train")
    assert rows == [{"text": "a", "text_pair": "b", "label": 3.8}, {"text": "a", "text_pair": "b", "label": 5.0}]
    assert task.check_labels(rows, SimpleNamespace(num_labels=1)) == rows


@pytest.mark.parametrize("score", ["high", "nan", float("inf"), float("nan"), ""])
def test_scores_that_are_no_numbers(score: Any) -> None:
    with pytest.raises(DataError, match=r"expected a number as score, found .* in row 1"):
        get_task("text-regression").normalize_rows([{"text": "a", "label": score}], DataConfig(), "train")


def test_heads_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"one output for text-regression, found one with 3; set .*text-classification"):
        get_task("text-regression").check_labels([], SimpleNamespace(num_labels=3))
