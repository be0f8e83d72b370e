"""Extractive question answering (SQuAD 1.1), judged by exact match and F1."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks.base import Task, Which
from ziplm_deploy.tasks.batching import (
    Batch,
    Example,
    as_float32,
    encode,
    length_limit,
    require_fast,
    split_examples,
    token_lengths,
    training_examples,
    unpadded,
    with_labels,
)
from ziplm_deploy.tasks.data import Row, cell
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.labels import labels_of, require_labels
from ziplm_deploy.tasks.losses import cross_entropy
from ziplm_deploy.tasks.metrics import Metric, ratio_of_sums
from ziplm_deploy.tasks.nested import parse_nested
from ziplm_deploy.tasks.outcomes import Outcomes

MAX_ANSWER_TOKENS = 30  # as in the reference evaluation of BERT
BEST = 20  # start and end positions considered a window
TOKENIZED_ROWS = 1000  # rows tokenized at once for training: windows with offsets take much memory
MIN_LENGTH = 32  # tokens; below it question and special tokens leave no room for context


@dataclass(frozen=True)
class Window:
    """A tokenized piece of one row's context."""

    row: int
    inputs: Example
    spans: list[tuple[int, int] | None]  # characters of the context a token covers; None outside the context


class QuestionAnswering(Task):
    """Rows: ``{"question", "context", "answers": [str] (if the data have them)}``. Every question has an answer.

    Training rows with answers also have ``answer_start``: the character of the context where the first of them begins.
    """

    name = "question-answering"
    metric_name = "f1"
    metrics: Mapping[str, Metric] = {"f1": ratio_of_sums("f1"), "exact_match": ratio_of_sums("exact_match")}
    auto_class = "AutoModelForQuestionAnswering"
    ort_class = "ORTModelForQuestionAnswering"
    output_names = ("start_logits", "end_logits")
    text_columns = (("question", "context"),)
    label_columns = ("answers",)
    label_names = ("start_positions", "end_positions")
    feature_outputs = ("start_logits", "end_logits")
    token_outputs = frozenset(feature_outputs)
    cuts_texts = False  # long contexts are read in windows

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        columns = self.columns(raw, data)
        if len(columns) != 2:
            raise DataError(f"expected question and context column, found data.text_columns {columns}; name both")
        label = self.find_label_column(raw, data, which)
        rows: list[Row] = []
        for number, source in enumerate(raw, 1):
            row: Row = {
                "question": cell(source, columns[0], str, number, "a question").strip(),
                "context": cell(source, columns[1], str, number, "a context"),
            }
            if label is not None:
                answers = cell(source, label, (dict, list, str), number, 'answers as {"text": […]}')
                if isinstance(answers, str):
                    answers = _unprinted(answers, label, number)
                row["answers"] = _answer_texts(answers, number, required=which == "evaluation")
                if which == "train" and row["answers"]:
                    row["answer_start"] = locate_answer(row, _given_start(answers), number)
            rows.append(row)
        if which == "train":
            labels_of(_labelled(rows))  # here the numbers in its message are still those of the file
        return rows

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        require_labels(_labelled(rows))
        return {}  # one start and one end logit a token, whatever the data

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        return token_lengths(processor, [{"text": row["question"], "text_pair": row["context"]} for row in rows])

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        """One window a row: the beginning of a context that is longer than ``max_length`` allows."""
        first: dict[int, Example] = {}
        for window in make_windows(data.processor, data.rows, data.max_length):
            first.setdefault(window.row, window.inputs)
        return data.tensors(list(first.values()), sort=sort)

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """One window a row: the first that holds the whole answer; ``start_positions`` and ``end_positions`` [1].

        Where none does, the first window with position 0, the special token at its beginning.
        """
        answered = labels_of(_labelled(rows)) is not None
        answers = [_answer_characters(row, number) if answered else None for number, row in enumerate(rows, 1)]
        found: list[tuple[Example, tuple[int, int]]] = []
        for first in range(0, len(rows), TOKENIZED_ROWS):
            part = slice(first, first + TOKENIZED_ROWS)
            found += _answer_windows(make_windows(processor, rows[part], max_length), answers[part])
        examples = training_examples([inputs for inputs, _ in found])
        if not answered:
            return examples
        starts, ends = [start for _, (start, _) in found], [end for _, (_, end) in found]
        return with_labels(with_labels(examples, starts, "start_positions"), ends, "end_positions")

    def collate(self, examples: list[Batch], processor: Any) -> Batch:
        batch = super().collate(examples, processor)
        if processor.padding_side == "left":
            sizes = torch.tensor([example["input_ids"].shape[1] for example in examples])  # [batch]
            shift = batch["input_ids"].shape[1] - sizes
            batch |= {name: batch[name] + shift for name in self.label_names if name in batch}
        return batch

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        windows = make_windows(data.processor, data.rows, data.max_length)
        best: dict[int, tuple[float, str]] = {}
        examples = [window.inputs for window in windows]
        for indices, inputs in data.batches(examples):
            outputs = function(inputs)
            starts, ends = as_float32(outputs["start_logits"]), as_float32(outputs["end_logits"])  # [batch, length]
            for position, index in enumerate(indices):
                window = windows[index]
                tokens = unpadded(len(window.spans), starts.shape[1], data.processor)
                score, characters = best_span(starts[position, tokens], ends[position, tokens], window.spans)
                if window.row not in best or score > best[window.row][0]:
                    context = data.rows[window.row]["context"]
                    best[window.row] = (score, context[slice(*characters)] if characters else "")
        scores = [_answer_scores(best[index][1], row["answers"]) for index, row in enumerate(data.rows)]
        return Outcomes({name: np.array([each[name] for each in scores]) for name in self.metrics})

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        return Outcomes({name: np.array([1.0, 0.0]) for name in outcomes.arrays})

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Start and end logits [2, batch, length], padding at -10⁴ so that it takes no probability."""
        logits = torch.stack([outputs["start_logits"], outputs["end_logits"]])
        return logits.masked_fill(batch["attention_mask"] == 0, -1e4)

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """KL of the start plus KL of the end distribution, mean over examples."""
        return 2.0 * super().divergence(candidate, dense)

    def sampled_loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return math.sqrt(2) * super().sampled_loss(features, generator)

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean of the cross-entropies of start and end over all tokens, as in transformers."""
        start, end = self.labels(batch)
        return (cross_entropy(outputs["start_logits"], start) + cross_entropy(outputs["end_logits"], end)) / 2


def make_windows(processor: Any, rows: list[Row], max_length: int) -> list[Window]:
    """All windows of all rows, overlapping by a quarter of ``max_length`` so that no answer is cut in two."""
    require_fast(processor, "question-answering")
    limit = length_limit(processor, max_length)
    if limit < MIN_LENGTH:
        raise DataError(
            f"expected a length of at least {MIN_LENGTH} tokens for question-answering, found {limit}; raise "
            "environment.workload.seq_len"
        )
    encoded = encode(
        processor,
        _shortened(processor, [row["question"] for row in rows], limit // 2),
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=limit,
        stride=min(128, limit // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
        return_attention_mask=True,
    )
    windows: list[Window] = []
    contexts = [rows[row]["context"] for row in encoded["overflow_to_sample_mapping"]]
    for index, inputs in enumerate(split_examples(encoded, processor, contexts)):
        parts = encoded.sequence_ids(index)
        offsets = encoded["offset_mapping"][index]
        spans = [tuple(span) if part == 1 else None for span, part in zip(offsets, parts, strict=True)]
        windows.append(Window(encoded["overflow_to_sample_mapping"][index], inputs, spans))
    return windows


def answer_tokens(window: Window, characters: tuple[int, int]) -> tuple[int, int] | None:
    """First and last token of an answer, given by its characters of the context [first, past the last).

    None if the window does not hold all of it.
    """
    start, end = characters
    spans = [(token, *span) for token, span in enumerate(window.spans) if span is not None]
    if not spans or spans[0][1] > start or spans[-1][2] < end:
        return None
    first = next(token for token, _, past in spans if past > start)
    last = next(token for token, begin, _ in reversed(spans) if begin < end)
    return (first, last) if first <= last else None  # the tokenizer dropped all its characters


def _answer_windows(
    windows: list[Window], answers: list[tuple[int, int] | None]
) -> list[tuple[Example, tuple[int, int]]]:
    """Window to train on for each row, and the answer's first and last token in it."""
    chosen: dict[int, tuple[Example, tuple[int, int]]] = {}
    done: set[int] = set()
    for window in windows:
        if window.row in done:
            continue
        answer = answers[window.row]
        tokens = None if answer is None else answer_tokens(window, answer)
        if tokens is not None:
            done.add(window.row)
        if tokens is not None or window.row not in chosen:
            chosen[window.row] = (window.inputs, tokens or (0, 0))
    return [chosen[row] for row in range(len(answers))]


def best_span(
    start: np.ndarray, end: np.ndarray, spans: list[tuple[int, int] | None]
) -> tuple[float, tuple[int, int] | None]:
    """Highest start + end logit over valid spans of the context: (score, characters), or (-inf, None) if none is.

    ``start`` and ``end`` are logits [length] of one window without padding.
    """
    inside = np.array([span is not None for span in spans])
    start, end = (np.where(inside, logits, -np.inf) for logits in (start, end))
    firsts, lasts = np.argsort(-start)[:BEST], np.argsort(-end)[:BEST]
    size = lasts[None, :] - firsts[:, None]  # [starts, ends]
    score = start[firsts][:, None] + end[lasts][None, :]
    score = np.where((size >= 0) & (size < MAX_ANSWER_TOKENS), score, -np.inf)
    row, column = np.unravel_index(int(score.argmax()), score.shape)
    first, last = spans[firsts[row]], spans[lasts[column]]
    if not np.isfinite(score[row, column]) or first is None or last is None:
        return -np.inf, None
    return float(score[row, column]), (first[0], last[1])


def _shortened(processor: Any, questions: list[str], limit: int) -> list[str]:
    """Questions cut to ``limit`` tokens, so that the context always has room."""
    offsets = encode(processor, questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        question[: spans[limit - 1][1]] if len(spans) > limit else question
        for question, spans in zip(questions, offsets, strict=True)
    ]


def _answer_texts(answers: Any, number: int, *, required: bool) -> list[str]:
    texts = answers.get("text", []) if isinstance(answers, dict) else answers
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"expected answers as text in row {number}, found {texts!r:.80}; correct that row")
    if required and not texts:
        raise DataError(
            f"expected an answer in row {number}, found none; questions without answers (SQuAD 2.0) are not "
            "supported, remove those rows"
        )
    return texts


def _unprinted(answer: str, column: str, number: int) -> Any:
    """What a table has printed so: ``{"text": […], "answer_start": […]}``, a list of answers, or one answer."""
    bare = answer.strip()
    if bare.startswith("{") and re.search("[\"']text[\"']\\s*:", bare) is not None:
        return parse_nested(answer, column, number)
    if not (bare.startswith("[") and bare.endswith("]")):
        return answer
    try:
        found = parse_nested(bare, column, number)
    except DataError:  # an answer in brackets
        return answer
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else answer


def locate_answer(row: Row, given: int | None, number: int) -> int:
    """Character of the context where the row's first answer begins: the one ``given``, or its first occurrence.

    Raises:
        DataError: the answer is blank or does not stand there, or nowhere; names the row.
    """
    text, context = row["answers"][0], row["context"]
    start = context.find(text) if given is None else given
    if text.strip() and start >= 0 and context.startswith(text, start):
        return int(start)
    where = "the context" if given is None else f"the context at character {given} (answer_start)"
    raise DataError(
        f"expected an answer that stands in {where}, found {text!r:.80} in row {number}; correct or remove it"
    )


def _given_start(answers: Any) -> int | None:
    starts = answers.get("answer_start") if isinstance(answers, dict) else None
    first = starts[0] if isinstance(starts, list) and starts else starts
    return first if isinstance(first, int) else None


def _labelled(rows: list[Row]) -> list[Row]:
    """Rows whose ``label`` is what is known about the answer, None where nothing is."""
    return [{"label": row.get("answers") or None} for row in rows]


def _answer_characters(row: Row, number: int) -> tuple[int, int]:
    """Characters of the context [first, past the last) of the first answer, without spaces around it."""
    text = row["answers"][0]
    start = row["answer_start"] if "answer_start" in row else locate_answer(row, None, number)
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _answer_scores(predicted: str, answers: list[str]) -> dict[str, float]:
    """F1 and exact match, 0 to 1, of the answer to one question against the nearest of those in the data."""
    from torchmetrics.functional.text import squad  # with all of torchmetrics: the longest import of a run

    starts = [0] * len(answers)  # the metric reads the texts only
    scores = squad(
        {"id": "", "prediction_text": predicted}, {"id": "", "answers": {"text": answers, "answer_start": starts}}
    )
    return {name: float(value) / 100 for name, value in scores.items()}
