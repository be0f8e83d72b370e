"""Cross-encoders: rows, rankings, losses, and data that allow none."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import tiny_model
from tests.helpers.search_data import ranked_rows
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks import get_task, torch_function
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.evaluation_set import cache_embeddings
from ziplm_deploy.tasks.ranking import ndcg, reciprocal_rank
from ziplm_deploy.tasks.resampling import ResampledScores

TASK: Any = get_task("reranking")


def normalized(raw: list[dict[str, Any]], which: str = "evaluation", **data: Any) -> list[dict[str, Any]]:
    return TASK.normalize_rows(raw, DataConfig(**data), which)  # type: ignore[no-any-return]


def scored_by(scores: list[float], rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    """A model's function that gives these scores to these rows, whatever their order in batches."""
    by_ids = {
        tuple(tokenizer(row["text"], row["text_pair"])["input_ids"]): value
        for row, value in zip(rows, scores, strict=True)
    }

    def function(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = [tuple(row[mask == 1]) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        return {"logits": np.array([[by_ids[each]] for each in ids], dtype=np.float32)}

    return function


def by_hand(scores: list[float], gains: list[float]) -> tuple[float, float]:
    """nDCG@10 and MRR@10 by their definitions, for scores without ties."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:10]
    found = sum(gains[index] / math.log2(rank + 2) for rank, index in enumerate(order))
    best = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(sorted(gains, reverse=True)[:10]))
    ranks = [rank for rank, index in enumerate(order, 1) if gains[index] > 0]
    return found / best, 1 / ranks[0] if ranks else 0.0


# rankings


@pytest.mark.parametrize("seed", range(4))
def test_a_ranking_is_worth_what_its_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, gains = rng.permutation(30).astype(float), rng.integers(0, 4, 30) * rng.integers(0, 2, 30).astype(float)
    expected = by_hand(scores.tolist(), gains.tolist())
    assert (ndcg(scores, gains), reciprocal_rank(scores, gains)) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
def test_a_model_that_scores_all_alike_gains_nothing_from_the_order_of_the_file(value: float) -> None:
    scores, gains = np.full(11, value), np.eye(11)[0]
    assert (ndcg(scores, gains), reciprocal_rank(scores, gains)) == (0.0, 0.0)
    assert reciprocal_rank(scores[:4], gains[:4]) == 0.25


def test_nothing_relevant_is_worth_nothing() -> None:
    assert ndcg(np.arange(3.0), np.zeros(3)) == reciprocal_rank(np.arange(3.0), np.zeros(3)) == 0.0


def test_every_query_has_its_score_whatever_the_order_of_the_rows(tokenizer: Any) -> None:
    rows = normalized(ranked_rows())
    rng = np.random.default_rng(0)
    scores = rng.normal(size=len(rows)).tolist()
    expected = [
        by_hand(scores[first : first + 4], [row["label"] for row in rows[first : first + 4]]) for first in (0, 4, 8, 12)
    ]
    outcomes = TASK.outcomes(scored_by(scores, rows, tokenizer), evaluation_set(rows, tokenizer))
    assert len(outcomes) == 6
    found = np.stack([outcomes["ndcg_at_10"], outcomes["mrr_at_10"]], axis=1)
    np.testing.assert_allclose(found[:4], expected)
    order = rng.permutation(len(rows))
    mixed = [rows[index] for index in order]
    other = TASK.outcomes(scored_by([scores[i] for i in order], mixed, tokenizer), evaluation_set(mixed, tokenizer))
    assert sorted(other["ndcg_at_10"]) == pytest.approx(sorted(outcomes["ndcg_at_10"]))
    low, high = ResampledScores(TASK, outcomes).interval("ndcg_at_10")
    assert 0 < low < TASK.scores(outcomes)["ndcg_at_10"] < high < 1


def test_fidelity_is_the_correlation_of_scores_and_costs_no_second_run(tokenizer: Any) -> None:
    rows = normalized(ranked_rows())
    scores = np.random.default_rng(1).normal(size=len(rows)).tolist()
    data, calls = evaluation_set(rows, tokenizer), 0
    dense = scored_by(scores, rows, tokenizer)

    def counted(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        return dense(inputs)  # type: ignore[no-any-return]

    cached = cache_embeddings(counted)
    TASK.outcomes(cached, data)
    for factor, expected in ((1.0, 1.0), (-2.0, -1.0), (0.0, 0.0), (math.nan, 0.0)):
        own = scored_by([factor * value for value in scores], rows, tokenizer)
        assert TASK.fidelity(own, cached, data, data) == {"score_correlation": pytest.approx(expected)}
    assert calls == len(rows) // 4


# rows


def test_n_evaluation_counts_queries_and_keeps_their_passages() -> None:
    rows = normalized(ranked_rows())
    drawn = TASK.sample(rows, "evaluation", 3, 0)
    assert len(drawn) == 12
    assert len({row["text"] for row in drawn}) == 3
    assert len(TASK.sample(rows, "calibration", 5, 0)) == 5
    with pytest.raises(DataError, match=r"at least 7 examples for data\.n_evaluation, found 6"):
        TASK.sample(rows, "evaluation", 7, 0)


def test_queries_that_no_order_can_decide_are_left_out_and_noted(tokenizer: Any) -> None:
    raw = ranked_rows(3)
    for row in raw[:4]:
        row["label"] = 0
    rows = normalized(raw)
    scores = [float(number) for number in range(len(rows))]
    outcomes = TASK.outcomes(scored_by(scores, rows, tokenizer), evaluation_set(rows, tokenizer))
    assert len(outcomes) == 2
    assert "1 of 3 evaluation queries" in TASK.label_note(rows, None)
    assert TASK.label_note(rows[4:], None) is None
    for row in raw:
        row["label"] = 1
    with pytest.raises(DataError, match="found none among 3 queries"):
        normalized(raw)


@pytest.mark.parametrize(
    ("raw", "data", "match"),
    [
        ({"text": "the cat"}, {}, "pairs of query and passage for reranking, .*found 'text'"),
        ({"sentence": "the cat", "label": 1}, {}, "pairs of query and passage .*found 'sentence', 'label'"),
        ({"query": "a", "passage": "b"}, {"text_columns": ["query"]}, "pairs of query and passage .*found 'query'"),
        ({"query": "a", "passage": "b"}, {"text_columns": ["query", "document"]}, "'query' [+] 'document'"),
        ({"query": "a", "passage": None, "label": 1}, {}, "text in column 'passage', found None in row 1"),
        ({"query": "a", "passage": "b", "label": -1}, {}, "0 or more, found -1 in row 1"),
        ({"query": "a", "passage": "b", "label": "yes"}, {}, "number as score, found 'yes' in row 1"),
        ({"query": "a", "passage": "b", "label": math.nan}, {}, "number as score, found nan in row 1"),
        (
            {"query": "a", "passage": "b", "label": NamedClass(0, ("entailment", "not_entailment"))},
            {},
            "found the class 'entailment' in row 1",
        ),
        ({"query": "a", "passage": "b"}, {}, "label"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(raw: dict[str, Any], data: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        normalized([raw, raw], **data)


def test_calibration_takes_pairs_without_labels_and_no_single_texts() -> None:
    pair = {"question": "who ran ?", "context": "a dog ran"}
    assert normalized([pair], "calibration") == [{"text": "who ran ?", "text_pair": "a dog ran"}]
    with pytest.raises(DataError, match="whose models score a pair"):
        normalized([{"text": "a dog ran"}], "calibration")


# training


def test_a_new_head_has_one_output_and_other_heads_are_refused() -> None:
    rows = normalized(ranked_rows(), "train")
    assert TASK.head_settings(rows) == {"num_labels": 1, "problem_type": None}
    with pytest.raises(DataError, match="one output for reranking, found one with 2"):
        TASK.check_labels(rows, SimpleNamespace(num_labels=2))


def test_labels_teach_by_cross_entropy_of_the_logit(tokenizer: Any) -> None:
    logits, labels = torch.tensor([[0.3], [-2.0]]), torch.tensor([1.0, 0.25])
    chance = torch.sigmoid(logits[:, 0])
    expected = -(labels * chance.log() + (1 - labels) * (1 - chance).log()).mean()
    torch.testing.assert_close(TASK.task_loss({"logits": logits}, {"labels": labels}), expected)
    graded = normalized([{**row, "label": 3 * row["label"]} for row in ranked_rows()], "train")
    for refused in (lambda: TASK.examples(graded, tokenizer, 32), lambda: TASK.head_settings(graded)):
        with pytest.raises(DataError, match=r"labels from 0 to 1 .*found 3 in row 1"):
            refused()
    assert "labels" not in TASK.examples(TASK.unlabelled(graded), tokenizer, 32)[0]


def test_students_learn_the_scores_and_not_their_order_alone() -> None:
    teacher = torch.tensor([[1.0], [2.0]], requires_grad=True)
    student = torch.tensor([[2.0], [4.0]], requires_grad=True)
    loss = TASK.distillation_loss(student, teacher, 2.0)
    assert loss.item() == pytest.approx(2.5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_model_ranks_as_its_logits_do(tokenizer: Any) -> None:
    model = tiny_model("bert", "text-regression")
    rows = normalized(ranked_rows(3))
    logits = []
    for row in rows:
        with torch.no_grad():
            logits.append(model(**tokenizer(row["text"], row["text_pair"], return_tensors="pt")).logits.item())
    outcomes = TASK.outcomes(torch_function(TASK, model), evaluation_set(rows, tokenizer))
    expected = [by_hand(logits[i : i + 4], [row["label"] for row in rows[i : i + 4]])[0] for i in (0, 4, 8)]
    np.testing.assert_allclose(outcomes["ndcg_at_10"], expected)
