"""Text tasks: batches, metrics against hand-made oracles, search losses; fixed shapes give the same answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import TEXT_TASKS, labelled_rows, sentences, tiny_model
from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig, ModelConfig
from ziplm_deploy.tasks import get_task, torch_function
from ziplm_deploy.tasks.batching import Arrays
from ziplm_deploy.tasks.embeddings import embedding_fidelity
from ziplm_deploy.tasks.losses import kl_divergence


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_fixed_shapes_change_no_metric(name: str, tokenizer: Any) -> None:
    """Static files: every call has the same shape, the last batch is filled up, and extra rows do not count."""
    task, model, rows = get_task(name), tiny_model("bert", name), labelled_rows(name, 11)
    shapes = set()

    def recording(inputs: Arrays) -> Arrays:
        shapes.update(array.shape for array in inputs.values())
        return torch_function(task, model)(inputs)

    dynamic = task.evaluate(torch_function(task, model), evaluation_set(rows, tokenizer, 3))
    static = task.evaluate(recording, evaluation_set(rows, tokenizer, pad_to=36))
    assert shapes == {(4, 36)}
    assert task.metric_name in dynamic
    assert static == pytest.approx(dynamic, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_encode_pads_and_keeps_every_row(name: str, side: str, tokenizer: Any) -> None:
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side=side)
    tokenizer.model_max_length = 40
    task = get_task(name)
    rows = [{"text": text} for text in dict.fromkeys(sentences(10))] if name == "sentence-similarity" else None
    rows = rows or labelled_rows(name, 10)
    batches = task.encode(evaluation_set(rows, tokenizer))
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert len(lengths) == len(rows)
    assert lengths == sorted(lengths)
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in batches)
    assert {tensor.dtype for batch in batches for tensor in batch.values()} == {torch.int64}
    fixed = task.encode(evaluation_set(rows, tokenizer, pad_to=39), sort=False)
    assert {batch["input_ids"].shape[1] for batch in fixed} == {39}
    edge = fixed[0]["attention_mask"][:, 0 if side == "left" else -1]
    assert not edge.any()


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_divergence_is_zero_for_the_same_and_positive_for_another_model(name: str, tokenizer: Any) -> None:
    task, rows = get_task(name), labelled_rows(name, 6)
    (batch,) = task.encode(evaluation_set(rows[:3], tokenizer, 8))
    with torch.no_grad():
        first, second = (
            task.features(task.forward(tiny_model("bert", name, seed=seed), batch), batch) for seed in (0, 1)
        )
    assert task.divergence(first, first).item() == pytest.approx(0, abs=1e-6)
    assert task.divergence(second, first).item() > 1e-4
    assert task.divergence(second, first).dim() == 0


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_padding_does_not_reach_the_search_loss(name: str, tokenizer: Any) -> None:
    task, rows, model = get_task(name), labelled_rows(name, 5), tiny_model("bert", name)
    with torch.no_grad():
        tight, wide = (
            task.features(task.forward(model, batch), batch)
            for pad_to in (None, 38)
            for batch in task.encode(evaluation_set(rows, tokenizer, 20, pad_to=pad_to))
        )
    other = torch.randn(tight.shape, generator=torch.Generator().manual_seed(0))
    if name == "question-answering":
        wide = wide[..., : tight.shape[-1]]
    assert task.divergence(other, tight).item() == pytest.approx(task.divergence(other, wide).item(), rel=1e-4)


def test_kl_against_torch() -> None:
    candidate, dense = torch.randn(7, 5), torch.randn(7, 5)
    oracle = torch.nn.functional.kl_div(
        candidate.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert kl_divergence(candidate, dense).item() == pytest.approx(oracle.item(), rel=1e-5)


def test_forward_leaves_out_inputs_the_model_does_not_take(tokenizer: Any) -> None:
    (batch,) = get_task("text-classification").encode(evaluation_set([{"text": "the cat"}], tokenizer))
    assert "token_type_ids" in batch
    outputs = get_task("text-classification").forward(tiny_model("distilbert", "text-classification"), batch)
    assert set(outputs) == {"logits"}


# sentence similarity


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embedding_pooled_here_and_in_the_graph_agree(pooling: str, tokenizer: Any) -> None:
    model_config = ModelConfig.model_validate({"path": "x", "task": "sentence-similarity", "pooling": pooling})
    task, rows = get_task(model_config), labelled_rows("sentence-similarity", 5)
    run = torch_function(task, tiny_model("bert"))

    def hidden_only(inputs: Arrays) -> Arrays:
        return {"last_hidden_state": run(inputs)["last_hidden_state"]}

    here, graph = (task.embed(each, evaluation_set(rows, tokenizer, 2)) for each in (hidden_only, run))  # type: ignore[attr-defined]
    np.testing.assert_allclose(here, graph, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(graph, axis=1), 1, rtol=1e-5)


def test_spearman_is_one_for_scores_in_the_order_of_the_cosines(tokenizer: Any) -> None:
    task, rows = get_task("sentence-similarity"), labelled_rows("sentence-similarity", 12)
    run = torch_function(task, tiny_model("bert"))
    left, right = (
        task.embed(run, evaluation_set([{"text": row[key]} for row in rows], tokenizer))  # type: ignore[attr-defined]
        for key in ("text", "text_pair")
    )
    ranked = [
        {**row, "label": float(np.exp(9 * score))} for row, score in zip(rows, (left * right).sum(1), strict=True)
    ]
    assert task.evaluate(run, evaluation_set(ranked, tokenizer))["spearman"] == pytest.approx(1)
    with pytest.raises(DataError, match="differing scores"):
        task.evaluate(run, evaluation_set([{**row, "label": 1.0} for row in rows], tokenizer))


def test_calibration_sentences_come_from_pairs_once_each() -> None:
    raw = [{"sentence1": "a", "sentence2": "b"}, {"sentence1": "b", "sentence2": " "}]
    task = get_task("sentence-similarity")
    assert task.normalize_rows(raw, DataConfig(), "calibration") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match="number as similarity score, found 'high' in row 1"):
        task.normalize_rows([{"sentence1": "a", "sentence2": "b", "label": "high"}], DataConfig(), "evaluation")


def test_fidelity_bounds() -> None:
    dense = np.random.default_rng(0).normal(size=(40, 16))
    assert embedding_fidelity(3 * dense, dense) == pytest.approx({"mean_cosine": 1, "neighbour_overlap": 1})
    other = embedding_fidelity(np.random.default_rng(1).normal(size=(40, 16)), dense)
    assert abs(other["mean_cosine"]) < 0.3
    assert other["neighbour_overlap"] == pytest.approx(10 / 39, abs=0.12)
    with pytest.raises(DataError, match="more than 10"):
        embedding_fidelity(dense[:10], dense[:10])


def test_fidelity_of_the_dense_model_to_itself(tokenizer: Any) -> None:
    task, rows = get_task("sentence-similarity"), labelled_rows("sentence-similarity", 12)
    run = torch_function(task, tiny_model("bert"))
    data = evaluation_set(rows, tokenizer)
    scores = task.fidelity(run, run, data, data)
    assert scores == pytest.approx({"mean_cosine": 1, "neighbour_overlap": 1})
    assert get_task("fill-mask").fidelity(run, run, data, data) == {}


# labels


HEAD = SimpleNamespace(num_labels=3, id2label={0: "NEG", 1: "POS", 2: "mixed"})


@pytest.mark.parametrize(("given", "expected"), [(2, 2), (1.0, 1), ("0", 0), ("POS", 1), ("pos ", 1), ("2.0", 2)])
def test_labels_are_mapped_to_the_heads_numbers(given: Any, expected: int) -> None:
    rows = get_task("text-classification").check_labels([{"text": "a", "label": given}, {"text": "b"}], HEAD)
    assert rows == [{"text": "a", "label": expected}, {"text": "b"}]


@pytest.mark.parametrize("label", [-1, 3, 0.5, "unknown", "7", ""])
def test_labels_that_do_not_fit_the_head(label: Any) -> None:
    with pytest.raises(DataError, match=r"0 to 2 or one of NEG, POS, mixed, found .* in row 2"):
        get_task("text-classification").check_labels([{"label": 1}, {"label": label}], HEAD)


def test_regression_heads_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 \(regression\).*text-regression"):
        get_task("text-classification").check_labels([], SimpleNamespace(num_labels=1, id2label={0: "LABEL_0"}))


def test_accuracy_of_a_run_that_knows_the_answer(tokenizer: Any) -> None:
    """Rows come back in their own order although batches are sorted by length."""
    rows = labelled_rows("text-classification", 17)
    answers = {
        tuple(tokenizer(row["text"], row["text_pair"], truncation=True, max_length=36)["input_ids"]): row["label"]
        for row in rows
    }

    def run(inputs: Arrays) -> Arrays:
        known = [
            answers[tuple(ids[mask == 1].tolist())]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return {"logits": np.eye(3, dtype=np.float32)[known]}

    task = get_task("text-classification")
    assert task.evaluate(run, evaluation_set(rows, tokenizer, pad_to=36)) == {"accuracy": 1.0, "macro_f1": 1.0}
    wrong = [{**row, "label": (row["label"] + 1) % 3} for row in rows]
    assert task.evaluate(run, evaluation_set(wrong, tokenizer))["accuracy"] == 0.0
    with pytest.raises(DataError, match="rows that check_labels returned"):
        task.evaluate(run, evaluation_set([{**rows[0], "label": "POS"}], tokenizer))
