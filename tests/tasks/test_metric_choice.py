"""Metrics that people compare by: as scikit-learn computes them, on resamples too, and chosen in the recipe."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import labelled_rows, tiny_model
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import TASKS, Task, get_task, torch_function
from ziplm_deploy.tasks.label_metrics import f1_of_label
from ziplm_deploy.tasks.metrics import (
    Metric,
    balanced_accuracy,
    class_f1,
    f1_of_class_1,
    macro_entity_f1,
    matthews,
    type_f1,
    weighted_f1,
)
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.resampling import ResampledScores

N = 60
Reference = Callable[[np.ndarray, np.ndarray], float]


def classes(n_classes: int, seed: int) -> Outcomes:
    generator = np.random.default_rng(seed)
    label = generator.integers(0, n_classes, N)
    return Outcomes(
        {"label": label, "predicted": np.where(generator.random(N) < 0.6, label, generator.integers(0, n_classes, N))}
    )


def resamples(seed: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    """Counts [6, N], the first all ones, the last of very few examples, and the examples that each row stands for."""
    generator = np.random.default_rng(seed)
    drawn = [np.arange(N), *(generator.integers(0, N, N) for _ in range(4)), generator.integers(0, 3, N)]
    return np.stack([np.bincount(each, minlength=N) for each in drawn]).astype(float), drawn


@pytest.mark.parametrize(
    ("metric", "n_classes", "reference"),
    [
        (matthews, 2, matthews_corrcoef),
        (matthews, 5, matthews_corrcoef),
        (balanced_accuracy, 4, balanced_accuracy_score),
        (weighted_f1, 4, lambda a, b: f1_score(a, b, average="weighted", zero_division=0)),
        (f1_of_class_1, 2, lambda a, b: f1_score(a, b, zero_division=0)),
    ],
)
def test_metrics_are_those_of_scikit_learn_on_every_resample(
    metric: Metric, n_classes: int, reference: Reference
) -> None:
    outcomes, (counts, drawn) = classes(n_classes, 1), resamples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on classes that a resample lacks
        expected = [reference(outcomes["label"][each], outcomes["predicted"][each]) for each in drawn]
    np.testing.assert_allclose(metric(outcomes, counts), expected, rtol=0, atol=1e-12)


def test_one_class_alone_has_no_correlation() -> None:
    alone = Outcomes({"label": np.zeros(5, int), "predicted": np.array([0, 1, 0, 1, 0])})
    assert matthews(alone, np.ones((1, 5)))[0] == 0.0


def test_several_labels_on_every_resample() -> None:
    generator = np.random.default_rng(0)
    expected, found = (generator.integers(0, 2, (N, 4)) for _ in range(2))
    outcomes = Outcomes({"right": expected * found, "found": found, "expected": expected}, tuple("abcd"))
    counts, drawn = resamples()
    wanted = [f1_score(expected[each], found[each], average="macro", zero_division=0) for each in drawn]
    np.testing.assert_allclose(macro_entity_f1(outcomes, counts), wanted, atol=1e-12)
    by_label = f1_score(expected, found, average=None)
    assert list(type_f1(outcomes).values()) == pytest.approx(by_label.tolist())


def test_scores_of_every_class() -> None:
    outcomes = classes(4, 2)
    expected = f1_score(outcomes["label"], outcomes["predicted"], average=None)
    assert list(class_f1(outcomes).values()) == pytest.approx(expected.tolist())
    head = SimpleNamespace(id2label={0: "a", 1: "b", 2: "c", 3: "d"})
    assert list(chosen("text-classification", None).label_scores(outcomes, head)) == ["a", "b", "c", "d"]


def chosen(task: str, metric: str | None) -> Task:
    return get_task(ModelConfig.model_validate({"path": "x", "task": task, "metric": metric}))


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_can_be_chosen(task: str) -> None:
    usual = chosen(task, None)
    known = {**usual.metrics, **usual.further_metrics}
    for name in known.keys() - usual.unscaled_metrics:
        given = chosen(task, name)
        assert (given.metric_name, next(iter(given.metrics))) == (name, name)
        assert set(given.metrics) == {name, *usual.metrics}
    assert usual.metric_name == TASKS[task].metric_name, "a choice leaves other tasks as they were"
    assert TASKS[task].metrics == usual.metrics
    with pytest.raises(RecipeError, match=f"a metric of {task} .*{usual.metric_name}.*found 'bleu'"):
        chosen(task, "bleu")


def test_a_metric_without_a_scale_is_no_choice() -> None:
    with pytest.raises(RecipeError, match=r"\(masked_accuracy\), found 'masked_log_likelihood'"):
        chosen("fill-mask", "masked_log_likelihood")


@pytest.mark.parametrize("name", ["matthews", "macro_f1"])
def test_the_chosen_metric_comes_first(name: str, tokenizer: Any) -> None:
    rows = labelled_rows("text-classification", 9)
    model = tiny_model("bert", "text-classification")
    task = chosen("text-classification", name)
    scores = task.evaluate(torch_function(task, model), evaluation_set(rows, tokenizer))
    assert list(scores) == list(dict.fromkeys((name, "accuracy", "macro_f1")))


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_f1_is_that_of_two_classes(task: str) -> None:
    two, three = (SimpleNamespace(num_labels=n, id2label={k: str(k) for k in range(n)}) for n in (2, 3))
    assert chosen(task, "f1").check_labels([{"label": 1}], two) == [{"label": 1}]
    with pytest.raises(RecipeError, match=r"two classes for model.metric f1.*found 3; set macro_f1"):
        chosen(task, "f1").check_labels([{"label": 1}], three)


@pytest.mark.parametrize("wanted", ["b", "d"])
def test_f1_of_one_class_is_that_of_scikit_learn(wanted: str) -> None:
    found, (counts, drawn) = classes(4, 5), resamples()
    outcomes = Outcomes(found.arrays, names=("a", "b", "c", "d"))
    number = "abcd".index(wanted)
    expected = [
        f1_score(found["label"][each] == number, found["predicted"][each] == number, zero_division=0) for each in drawn
    ]
    np.testing.assert_allclose(f1_of_label(wanted)(outcomes, counts), expected, rtol=0, atol=1e-12)
    task = chosen("text-classification", f"f1:{wanted}")
    low, high = ResampledScores(task, outcomes).interval(f"f1:{wanted}")
    assert low <= expected[0] <= high
    added = task.right_and_wrong(outcomes)
    assert added is not None
    assert added["label"].tolist() == [number, number], "intervals know of an error in the label that counts"
    assert added["predicted"][0] == number != added["predicted"][1]


def test_f1_of_one_of_several_labels() -> None:
    generator = np.random.default_rng(0)
    expected, found = (generator.integers(0, 2, (N, 4)) for _ in range(2))
    arrays = {"right": expected * found, "found": found, "expected": expected, "exact": (expected == found).all(1)}
    outcomes = Outcomes({name: values.astype(int) for name, values in arrays.items()}, tuple("abcd"))
    counts, drawn = resamples()
    wanted = [f1_score(expected[each, 2], found[each, 2], zero_division=0) for each in drawn]
    np.testing.assert_allclose(f1_of_label("c")(outcomes, counts), wanted, atol=1e-12)
    added = chosen("multi-label-classification", "f1:c").right_and_wrong(outcomes)
    assert added is not None
    assert added["expected"].tolist() == [[0, 0, 1, 0]] * 2


HEADS: dict[str, Any] = {
    "text-classification": ["ham", "spam", "fraud"],
    "image-classification": ["ham", "spam", "fraud"],
    "multi-label-classification": ["ham", "spam", "fraud"],
    "token-classification": ["O", "B-spam", "I-spam", "B-fraud"],
}


def labelled(task: str, *labels: str) -> list[dict[str, Any]]:
    if task == "token-classification":
        return [{"words": ["x", "y"], "label": [f"B-{label}", "O"]} for label in labels]
    return [{"text": "x", "label": [label] if task == "multi-label-classification" else label} for label in labels]


@pytest.mark.parametrize("task", HEADS)
def test_a_label_that_model_or_examples_do_not_have_is_refused(task: str) -> None:
    names = HEADS[task]
    head = SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)), problem_type=None)
    right = chosen(task, "f1:spam")
    few, enough = (right.check_labels(labelled(task, "fraud", *["spam"] * n), head) for n in (7, 8))
    settle = functools.partial(right.settle_rows, data=DataConfig(), seed=0, processor=None)
    assert settle(enough, which="evaluation") == enough
    assert settle(few, which="train") == few, "training and calibration may do without"
    with pytest.raises(RecipeError, match=r"a label of the model in model\.metric \(.*spam.*\), found 'eggs'"):
        chosen(task, "f1:eggs").check_labels([], head)
    with pytest.raises(DataError, match=r"8 or more evaluation examples of 'spam'.*found 7; give more"):
        settle(few, which="evaluation")


def test_only_tasks_with_classes_have_f1_of_one() -> None:
    with pytest.raises(RecipeError, match=r"a metric of question-answering \(f1, exact_match\), found 'f1:spam'"):
        chosen("question-answering", "f1:spam")
    with pytest.raises(RecipeError, match=r"f1:LABEL\), found 'bleu'"):
        chosen("text-classification", "bleu")


def test_f1_of_one_class_is_evaluated(tokenizer: Any) -> None:
    task, model = chosen("text-classification", "f1:LABEL_1"), tiny_model("bert", "text-classification")
    rows = task.check_labels(labelled_rows("text-classification", 9), model.config)
    scores = task.evaluate(torch_function(task, model), evaluation_set(rows, tokenizer))
    assert list(scores) == ["f1:LABEL_1", "accuracy", "macro_f1"]
    outcomes = task.outcomes(torch_function(task, model), evaluation_set(rows, tokenizer))
    expected = f1_score(outcomes["label"] == 1, outcomes["predicted"] == 1, zero_division=0)
    assert scores["f1:LABEL_1"] == pytest.approx(expected)
