"""Rows in batches: every row once, batches of the asked-for shape; and what is remembered of a model's answers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from exporters.heads import pool
from tests.helpers.evaluation import evaluation_set
from tests.helpers.models import labelled_rows
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.tasks import EvaluationSet, get_task
from ziplm_deploy.tasks.batching import token_lengths
from ziplm_deploy.tasks.evaluation_set import cache_embeddings


@pytest.mark.parametrize("pad_to", [None, 40])
@pytest.mark.parametrize("sizes", [[1], [4], [4, 4, 1]])
def test_batches_hold_every_row_once_by_length(sizes: list[int], pad_to: int | None, tokenizer: Any) -> None:
    n_rows = sum(sizes)
    data = evaluation_set([{"text": "cat " * (9 - number)} for number in range(n_rows)], tokenizer, pad_to=pad_to)
    examples = data.tokenize()
    batches = list(data.batches(examples))
    assert [len(indices) for indices, _ in batches] == sizes
    order = [index for indices, _ in batches for index in indices]
    assert order == sorted(range(n_rows), key=lambda index: len(examples[index]["input_ids"]))
    for indices, inputs in batches:
        ids = inputs["input_ids"]
        longest = max(len(examples[index]["input_ids"]) for index in indices)
        assert ids.dtype == np.int64
        assert ids.shape == ((len(indices), longest) if pad_to is None else (4, pad_to))
        assert (ids[len(indices) :] == ids[len(indices) - 1]).all(), "a batch is filled up with its last example"
        for index, row in zip(indices, ids.tolist(), strict=False):
            assert [token for token in row if token != tokenizer.pad_token_id] == examples[index]["input_ids"]


@pytest.mark.parametrize("sort", [False, True])
def test_tensors_are_the_batches_without_what_fills_them_up(sort: bool, tokenizer: Any) -> None:
    data = evaluation_set(labelled_rows("text-classification", 9), tokenizer, pad_to=38)
    examples = data.tokenize()
    tensors = data.tensors(examples, sort=sort)
    assert [len(batch["input_ids"]) for batch in tensors] == [4, 4, 1]
    lengths = [int(length) for batch in tensors for length in batch["attention_mask"].sum(1)]
    assert lengths == (sorted(lengths) if sort else [len(example["input_ids"]) for example in examples])
    if sort:
        for batch, (indices, inputs) in zip(tensors, data.batches(examples), strict=True):
            assert all(np.array_equal(batch[name].numpy(), inputs[name][: len(indices)]) for name in inputs)


def test_no_examples_give_no_batches() -> None:
    data = evaluation_set([], None)
    assert [*data.batches([]), *data.tensors([], sort=True)] == []


def test_other_rows_go_through_the_model_in_the_same_way(tokenizer: Any) -> None:
    data = EvaluationSet([{"text": "a"}], tokenizer, 36, 4, 38)
    assert data.with_rows([]) == EvaluationSet([], tokenizer, 36, 4, 38)
    assert data.rows == [{"text": "a"}]
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.batch_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 0}, "batch_size of at least 1 example, found 0"),
        ({"batch_size": -4}, "found -4"),
        ({"pad_to": 0}, "pad_to of at least 1 token, found 0; None pads"),
        ({"pad_to": -1}, "found -1"),
        ({"max_length": -1}, "max_length of no fewer than 0 tokens, found -1"),
    ],
)
def test_sizes_that_no_batch_has(changes: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        evaluation_set([], None, **changes)
    with pytest.raises(ValueError, match=expected):
        dataclasses.replace(evaluation_set([], None), **changes)


def test_an_example_longer_than_pad_to_is_refused(tokenizer: Any) -> None:
    data = evaluation_set([{"text": "cat " * 9}], tokenizer, pad_to=8)
    with pytest.raises(ValueError, match=r"at most 8 tokens \(pad_to\), found 11; raise pad_to"):
        next(data.batches(data.tokenize()))
    with pytest.raises(ValueError, match="pad_to"):
        data.tensors(data.tokenize(), sort=False)


@pytest.mark.parametrize(("name", "calls_expected"), [("sentence_embedding", 2), ("logits", 3)])
def test_only_embeddings_are_kept(name: str, calls_expected: int) -> None:
    calls = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        return {name: inputs["input_ids"].sum(axis=1), "last_hidden_state": np.zeros(3)}

    remembered = cache_embeddings(run)
    one, other = ({"input_ids": np.full((2, 3), value), "mask": np.ones((2, 3))} for value in (1, 2))
    first = remembered(one)[name]
    np.testing.assert_array_equal(remembered(one)[name], first)
    assert not np.array_equal(remembered(other)[name], first)
    assert len(calls) == calls_expected


def test_metric_and_fidelity_read_each_batch_once(tokenizer: Any) -> None:
    task = get_task("sentence-similarity")
    data = evaluation_set(labelled_rows("sentence-similarity", 12), tokenizer)
    calls = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        ids = inputs["input_ids"] * inputs["attention_mask"]
        return {"sentence_embedding": np.stack([np.bincount(row, minlength=60) for row in ids]).astype(np.float32)}

    remembered = cache_embeddings(run)
    scores = task.evaluate(remembered, data)
    evaluated = len(calls)
    assert task.fidelity(remembered, run, data, data)["mean_cosine"] == pytest.approx(1)
    assert len(calls) == 2 * evaluated, "the dense model is asked once, the candidate not again"
    assert scores == task.evaluate(run, data)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_pooled_as_in_the_exported_graph(pooling: str, normalize: bool, tokenizer: Any) -> None:
    settings = {"path": "x", "task": "sentence-similarity", "pooling": pooling, "normalize": normalize}
    task = get_task(ModelConfig.model_validate(settings))
    data = evaluation_set(labelled_rows("sentence-similarity", 1), tokenizer)
    hidden = np.random.default_rng(0).normal(size=(1, 36, 8)).astype(np.float32)
    masks = []

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        masks.append(torch.from_numpy(inputs["attention_mask"]))
        return {"last_hidden_state": hidden[:, : inputs["input_ids"].shape[1]]}

    found = task.embed(run, data)  # type: ignore[attr-defined]
    (mask,) = masks
    states = torch.from_numpy(hidden[:, : mask.shape[1]])
    np.testing.assert_array_equal(found, pool(states, mask, pooling, normalize).numpy())  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [None, 7])
@pytest.mark.parametrize("task", ["text-classification", "question-answering", "token-classification"])
def test_a_tokenizer_keeps_its_own_truncation_and_padding(task: Any, own: int | None, tokenizer: Any) -> None:
    """Both are saved with it, for everybody who loads it afterwards."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    if own is None:
        backend.no_truncation()
        backend.no_padding()
    else:
        backend.enable_truncation(own, stride=1)
        backend.enable_padding(length=own, pad_id=0)
    before = backend.to_str()
    settings = ModelConfig(path="any", task=task)
    rows = labelled_rows(task, 5)
    examples = get_task(settings).encode(EvaluationSet(rows, tokenizer, 36, 4, None))
    assert max(batch["input_ids"].shape[1] for batch in examples) > 7
    token_lengths(tokenizer, [{"text": "a cat " * 20}])
    assert backend.to_str() == before
