"""Several labels a text: reading them, the loss that sees each class for itself, and F1 over all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import save_dense, sentences, tiny_model
from ziplm_deploy.errors import DataError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import get_task, torch_function
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.losses import bernoulli_divergence, kl_divergence

TASK = get_task("multi-label-classification")
NAMES = ["red", "green", "blue"]
HEAD = SimpleNamespace(num_labels=3, id2label=dict(enumerate(NAMES)), problem_type="multi_label_classification")


def labels(given: list[Any], config: Any = HEAD) -> list[list[int]]:
    raw = [{"text": "a", "labels": label} for label in given]
    rows = TASK.normalize_rows(raw, DataConfig(), "evaluation")
    return [row["label"] for row in TASK.check_labels(rows, config)]


@pytest.mark.parametrize(
    "given",
    [
        [["blue", "red"], [], ["green"]],
        [[2, 0], [], [1]],
        [[2.0, 0.0], [], ["1"]],
        [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
        [[1.0, 0.0, True], [0, 0, 0], [0, 1, 0]],
        ["[1. 0. 1.]", "[0. 0. 0.]", "[0. 1. 0.]"],  # a table
        ["['blue' 'red']", "[]", "['green']"],
    ],
)
def test_every_form_of_labels_is_understood(given: list[Any]) -> None:
    assert labels(given) == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_classes_of_the_data_set_are_found_by_name() -> None:
    order = ("blue", "green", "red")
    assert labels([[NamedClass(0, order)], [NamedClass(1, order), NamedClass(2, order)]]) == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[1, 0, 1, 0]], r"zero or one for each of the model's 3 classes, found 4 in row 1"),
        ([[0, 1], [0, 1, 1]], r"each class once among the labels of row 2, found \[0, 1, 1\]"),
        ([["red"], ["pink"]], "found 'pink' in row 2"),
        ([[3]], "found 3 in row 1"),
        ([[0.3, 0.7, 0.1]], "found 0.3 in row 1"),
        ([1], "expected a label in column 'labels', found 1 in row 1"),
    ],
)
def test_labels_that_do_not_fit(given: list[Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        labels(given)


def test_heads_and_tasks_belong_together() -> None:
    single = SimpleNamespace(num_labels=3, id2label=HEAD.id2label, problem_type="single_label_classification")
    with pytest.raises(DataError, match=r"problem_type single_label_classification .*text-classification"):
        labels([[1]], single)
    for name in ("text-classification", "image-classification"):
        with pytest.raises(DataError, match=r"problem_type multi_label_classification.*multi-label-classification"):
            get_task(name).check_labels([], HEAD)
    for given, names in (
        ([["b", "a"], []], {0: "a", 1: "b"}),
        ([[0, 1, 0], [1, 1, 1]], {0: "0", 1: "1", 2: "2"}),
        ([[4], [0, 2]], dict(enumerate("01234"))),
    ):
        settings = TASK.head_settings([{"text": "a", "label": label} for label in given])
        assert (settings["id2label"], settings["problem_type"]) == (names, "multi_label_classification")


def test_scores_are_those_of_scikit_learn(tokenizer: Any) -> None:
    model = tiny_model("bert", "text-classification", num_labels=3)
    generator = np.random.default_rng(0)
    raw = [{"text": text, "label": generator.integers(0, 2, 3).tolist()} for text in sentences(30)]
    rows = TASK.check_labels(raw, HEAD)
    data = evaluation_set(rows, tokenizer, 4)
    scores = TASK.evaluate(torch_function(TASK, model), data)
    predicted = TASK.predict(torch_function(TASK, model), data) > 0  # type: ignore[attr-defined]
    truth = np.array([row["label"] for row in raw])
    assert list(scores) == ["micro_f1", "macro_f1", "exact_match"]
    for name in ("micro", "macro"):
        assert scores[f"{name}_f1"] == pytest.approx(f1_score(truth, predicted, average=name, zero_division=0))
    assert scores["exact_match"] == pytest.approx((truth == predicted).all(axis=1).mean())
    own = [{**row, "label": answer.astype(int).tolist()} for row, answer in zip(rows, predicted, strict=True)]
    assert TASK.evaluate(torch_function(TASK, model), evaluation_set(own, tokenizer))["micro_f1"] == 1.0


def test_the_losses_see_every_class_for_itself(tokenizer: Any) -> None:
    dense = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(dense + 2, dense).item() == pytest.approx(0, abs=1e-6), "softmax does not see the shift"
    assert TASK.divergence(dense + 2, dense).item() > 0.1
    assert TASK.distillation_loss(dense, dense, 2.0).item() == pytest.approx(0, abs=1e-6)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=dense), torch.distributions.Bernoulli(logits=dense + 2)
    )
    assert bernoulli_divergence(dense + 2, dense).item() == pytest.approx(oracle.sum(-1).mean().item(), rel=1e-5)
    assert torch.isfinite(bernoulli_divergence(torch.full((1, 2), 200.0), torch.full((1, 2), -200.0)))


def test_training_pushes_each_class_towards_its_label(tokenizer: Any) -> None:
    model = tiny_model("bert", "text-classification", num_labels=3, problem_type="multi_label_classification")
    rows = TASK.check_labels([{"text": "the cat", "label": [1, 0, 1]}, {"text": "a dog ran", "label": [0, 1, 1]}], HEAD)
    batch = TASK.collate(TASK.examples(rows, tokenizer, 16), tokenizer)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 1, 1]]
    own = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, labels=batch["labels"].float()).loss
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = TASK.task_loss(TASK.forward(model, batch), batch)
    assert first.item() == pytest.approx(own.item(), rel=1e-5), "the loss of transformers"
    for _ in range(20):
        optimizer.zero_grad()
        TASK.task_loss(TASK.forward(model, batch), batch).backward()
        optimizer.step()
    decided = (TASK.forward(model, batch)["logits"] > 0).int().tolist()
    assert decided == batch["labels"].tolist()


def test_the_kind_of_head_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    save_dense(tmp_path, task="text-classification", problem_type="multi_label_classification")
    settings = ModelConfig(path=str(tmp_path), task="multi-label-classification")
    model, _ = load_dense(settings)
    assert TASK.check_labels([{"text": "a", "label": ["LABEL_2"]}], model.config)[0]["label"] == [0, 0, 1]
