"""Outcomes and the metrics of them: against the libraries that people compare by, and on every choice of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1_score
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, f1_score
from torchmetrics.functional.text import squad

from ziplm_deploy.errors import CorruptArtifactError, DataError
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.answering import _answer_scores
from ziplm_deploy.tasks.entities import TagScheme
from ziplm_deploy.tasks.metrics import Metric, accuracy, class_counts, macro_f1, pearson, score, spearman
from ziplm_deploy.tasks.outcomes import Outcomes, _OutcomesFile, halves
from ziplm_deploy.tasks.scores import value_outcomes
from ziplm_deploy.tasks.tokens import _entity_outcomes

N = 60
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def classes(seed: int, n: int = N, labels: tuple[int, ...] = (0, 1, 5, 7)) -> Outcomes:
    """Labels and predictions that agree in about half; the numbers have gaps, and 9 is never a label."""
    generator = np.random.default_rng(seed)
    label = generator.choice(labels, n)
    return Outcomes(
        {"label": label, "predicted": np.where(generator.random(n) < 0.5, label, generator.choice((*labels, 9), n))}
    )


def numbers(seed: int, n: int = N) -> Outcomes:
    """Labels with many ties, predictions with some."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 6, n) / 5
    return Outcomes({"label": label, "predicted": np.round(label + generator.normal(size=n), 1)})


def resamples(n: int, seed: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    """Counts [5, n], the first all ones, and the examples that each row of them stands for."""
    generator = np.random.default_rng(seed)
    drawn = [np.arange(n), *(generator.integers(0, n, n) for _ in range(4))]
    return np.stack([np.bincount(each, minlength=n) for each in drawn]).astype(float), drawn


def _macro(outcomes: Outcomes) -> float:
    return float(f1_score(outcomes["label"], outcomes["predicted"], average="macro", zero_division=0))


@pytest.mark.parametrize(
    ("metric", "outcomes", "reference"),
    [
        (accuracy, classes(0), lambda o: accuracy_score(o["label"], o["predicted"])),
        (macro_f1, classes(1), _macro),
        (pearson, numbers(2), lambda o: pearsonr(o["label"], o["predicted"])[0]),
        (spearman, numbers(3), lambda o: spearmanr(o["label"], o["predicted"])[0]),
    ],
)
def test_metrics_are_those_of_the_libraries_on_every_resample(
    metric: Metric, outcomes: Outcomes, reference: Any
) -> None:
    counts, drawn = resamples(N)
    expected = [float(reference(outcomes.take(each))) for each in drawn]
    np.testing.assert_allclose(metric(outcomes, counts), expected, rtol=0, atol=1e-12)
    assert score(metric, outcomes) == pytest.approx(expected[0], abs=1e-12)


def test_class_counts_are_rows_and_columns_of_the_confusion_matrix() -> None:
    right, found, expected = class_counts(classes(4), np.ones((1, N)))
    label, predicted = classes(4)["label"], classes(4)["predicted"]
    known = [0, 1, 5, 7, 9]
    assert right[0].tolist() == [int(((label == k) & (predicted == k)).sum()) for k in known]
    assert (found[0].tolist(), expected[0].tolist()) == (
        [int((predicted == k).sum()) for k in known],
        [int((label == k).sum()) for k in known],
    )


@pytest.mark.parametrize("bare", [False, True])
def test_entities_of_texts_add_up_to_seqeval(bare: bool) -> None:
    generator = np.random.default_rng(5)
    tags = ["O", "PER", "LOC"] if bare else TAGS
    truth = [[str(tag) for tag in generator.choice(tags, generator.integers(1, 9))] for _ in range(N)]
    predicted = [[tag if generator.random() < 0.7 else str(generator.choice(tags)) for tag in row] for row in truth]
    task, outcomes = get_task("token-classification"), _entity_outcomes(truth, predicted, TagScheme.of(tags))
    if bare:
        truth, predicted = (
            [[tag if tag == "O" else f"B-{tag}" for tag in row] for row in texts] for texts in (truth, predicted)
        )
    assert outcomes.names == ("LOC", "PER")
    counts, drawn = resamples(N)
    for name, reference in (
        ("entity_f1", entity_f1_score),
        ("entity_precision", precision_score),
        ("entity_recall", recall_score),
    ):
        expected = [reference([truth[i] for i in each], [predicted[i] for i in each]) for each in drawn]
        np.testing.assert_allclose(task.metrics[name](outcomes, counts), expected, rtol=0, atol=1e-12)
    hits = [one == other for a, b in zip(truth, predicted, strict=True) for one, other in zip(a, b, strict=True)]
    assert task.scores(outcomes)["token_accuracy"] == pytest.approx(np.mean(hits))


def test_texts_without_any_entity_score_nothing() -> None:
    outcomes = _entity_outcomes([["O", "O"], ["O"]], [["O", "O"], ["O"]], TagScheme.of(["O"]))
    assert outcomes["right"].shape == (2, 0)
    scores = get_task("token-classification").scores(outcomes)
    assert (scores["entity_f1"], scores["token_accuracy"]) == (0.0, 1.0)


def test_answers_one_by_one_have_the_mean_of_all_together() -> None:
    given = [("the cat", ["a cat"]), ("a dog ran", ["the dog", "ran on"]), ("", ["mat"]), ("on", ["on", "off"])]
    each = [_answer_scores(predicted, answers) for predicted, answers in given]
    together = squad(
        [{"prediction_text": predicted, "id": str(i)} for i, (predicted, _) in enumerate(given)],
        [{"answers": {"text": a, "answer_start": [0] * len(a)}, "id": str(i)} for i, (_, a) in enumerate(given)],
    )
    for name in ("f1", "exact_match"):
        assert np.mean([scores[name] for scores in each]) == pytest.approx(float(together[name]) / 100)


@pytest.mark.parametrize("metric", [spearman, pearson])
@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 1 / 3])
def test_a_collapsed_model_has_no_correlation(metric: Metric, constant: float) -> None:
    labels = np.random.default_rng(0).normal(size=7)
    assert score(metric, value_outcomes(np.full(7, constant), labels)) == 0.0
    assert score(metric, value_outcomes(np.array([np.nan, *range(6)]), labels)) == 0.0
    counts = np.zeros((1, 7))
    counts[0, 2] = 7  # a resample of one example only
    assert metric(value_outcomes(labels, labels), counts).tolist() == [0.0]


@pytest.mark.parametrize(
    "outcomes",
    [classes(0), numbers(0), _entity_outcomes([["B-X", "O"]], [["B-X", "B-Y"]], TagScheme.of(["O", "B-X", "B-Y"]))],
)
def test_outcomes_come_back_from_the_disk(outcomes: Outcomes, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    found = Outcomes.load(path, outcomes.save(path))
    assert found.names == outcomes.names
    assert found.arrays.keys() == outcomes.arrays.keys()
    for name, values in outcomes.arrays.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype


def test_other_outcomes_than_those_of_the_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    expected = classes(0).save(path)
    classes(1).save(path)
    with pytest.raises(CorruptArtifactError, match=r"computed from in .*outcomes\.json, found others; delete it"):
        Outcomes.load(path, expected)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match="expected a record of outcomes"):
        Outcomes.load(path, expected)


@pytest.mark.parametrize(
    "arrays",
    [
        {"label": [1, 2], "predicted": [1]},
        {},
        {"label": [[1], [1, 2]]},
        {"label": 3},
        {"label": ["a"]},
    ],
)
def test_outcomes_of_another_shape_are_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    text = {"kind": "record_of_outcomes", "schema_version": 1, "arrays": arrays, "names": []}
    path.write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="wrong fields"):
        Outcomes.load(path, "")


def test_arrays_of_different_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"over the same examples, found lengths \[1, 2\]"):
        Outcomes({"label": np.zeros(2), "predicted": np.zeros(1)})


def test_halves_share_nothing_and_stay_the_same() -> None:
    chosen_by, reported = halves(11, seed=4)
    assert sorted([*chosen_by, *reported]) == list(range(11))
    assert (len(chosen_by), len(reported)) == (5, 6)
    assert all(np.array_equal(a, b) for a, b in zip(halves(11, 4), (chosen_by, reported), strict=True))
    assert not np.array_equal(halves(11, 5)[0], chosen_by)
    assert classes(0).take(chosen_by)["label"].tolist() == classes(0)["label"][chosen_by].tolist()


def test_outcomes_of_many_classes_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what other files may have: 100,000 texts of 1,000 classes, with three arrays of three bytes a number."""
    assert _OutcomesFile.MAX_BYTES > 100_000 * 1_000 * 3 * 3
    names = tuple(map(str, range(100)))
    outcomes = Outcomes({name: np.ones((1_200, 100), dtype=np.int64) for name in ("label", "predicted")}, names)
    path = tmp_path / "outcomes.json"
    saved = outcomes.save(path)
    assert path.stat().st_size < 3.1 * 2 * 1_200 * 100
    assert Outcomes.load(path, saved)["label"].shape == (1_200, 100)
    monkeypatch.setattr(_OutcomesFile, "MAX_BYTES", 64 << 10)
    with pytest.raises(CorruptArtifactError, match="more than 64 KiB"):
        Outcomes.load(path, saved)
    monkeypatch.setattr(_OutcomesFile, "MAX_BYTES", 1 << 19)
    with pytest.raises(DataError, match=r"within 0 MiB, found more, of 1,200 examples; .*data\.n_evaluation"):
        outcomes.save(path)
    assert not path.exists()
