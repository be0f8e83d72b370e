"""Token classification (named entities), judged by entity F1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ziplm_deploy.errors import DataError
from ziplm_deploy.recipe import DataConfig
from ziplm_deploy.tasks.base import Task, Which
from ziplm_deploy.tasks.batching import (
    Batch,
    Example,
    encode,
    length_limit,
    require_fast,
    split_examples,
    token_lengths,
    training_examples,
    unpadded,
)
from ziplm_deploy.tasks.data import Row, cell
from ziplm_deploy.tasks.entities import TagScheme
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.label_metrics import check_label, label_number
from ziplm_deploy.tasks.label_reading import LabelReading, are_unnamed, read_labels
from ziplm_deploy.tasks.labels import class_head, labels_in, labels_of, require_labels
from ziplm_deploy.tasks.losses import IGNORED
from ziplm_deploy.tasks.metrics import (
    Metric,
    entity_f1,
    entity_precision,
    entity_recall,
    ratio_of_sums,
    right_and_wrong_entity,
    type_f1,
)
from ziplm_deploy.tasks.outcomes import Outcomes


class TokenClassification(Task):
    """Rows: ``{"words": [str], "label": [class] (if the data have it)}``; a word's class is read at its first token.

    Words that truncation cuts off count as ``O``. After :meth:`check_labels` rows carry ``label`` as class numbers and
    ``label_names``, the model's names by number, or the data set's where the model has none. Entities are seen in names
    alone: without any, ``token_accuracy`` is the only score, and has to be asked for.
    """

    name = "token-classification"
    metric_name = "entity_f1"
    metrics: Mapping[str, Metric] = {
        "entity_f1": entity_f1,
        "entity_precision": entity_precision,
        "entity_recall": entity_recall,
        "token_accuracy": ratio_of_sums("right_words", "words"),
    }
    auto_class = "AutoModelForTokenClassification"
    ort_class = "ORTModelForTokenClassification"
    output_names = ("logits",)
    text_columns = (("tokens",), ("words",))
    label_columns = ("ner_tags", "tags", "labels", "label")
    token_outputs = frozenset({"logits"})
    has_classes = True
    reading_version = 3  # 1 took words for entities where tags have no names, 2 left out a space that is a token

    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        columns = self.columns(raw, data)
        if len(columns) != 1:
            raise DataError(f"expected one column with lists of words, found data.text_columns {columns}; name one")
        label = self.find_label_column(raw, data, which)
        rows: list[Row] = []
        for number, source in enumerate(raw, 1):
            row: Row = {"words": cell(source, columns[0], list, number, "a list of words")}
            if not all(isinstance(word, str) for word in row["words"]):
                raise DataError(f"expected words as text in row {number}, found {row['words']!r:.80}; correct that row")
            if label is not None:
                row["label"] = cell(source, label, list, number, "a list of tags, one a word")
                if len(row["label"]) != len(row["words"]):
                    raise DataError(
                        f"expected one tag a word in row {number}, found {len(row['label'])} tags for "
                        f"{len(row['words'])} words; correct that row"
                    )
            rows.append(row)
        return rows

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        reading = read_labels(labels_in(rows), config)
        takes_names = are_unnamed(reading.names) and len(reading.set_names) == len(reading.names)
        names = list(reading.set_names if takes_names else reading.names)
        checked = [
            {**row, "label": [reading.number(tag, number) for tag in row["label"]], "label_names": names}
            if "label" in row
            else row
            for number, row in enumerate(rows, 1)
        ]
        if not are_unnamed(names):
            check_label(self.metric_name, sorted({kind for _, kind in TagScheme.of(names).parts.values()}))
        return checked

    def settle_rows(self, rows: list[Row], data: DataConfig, which: Which, seed: int, processor: Any) -> list[Row]:
        if which == "evaluation" and rows and "label_names" in rows[0]:
            self._check_named(rows[0]["label_names"])
        return super().settle_rows(rows, data, which, seed, processor)

    def example_labels(self, row: Row) -> set[str]:
        names = row["label_names"]
        parts = TagScheme.of(names).parts
        return {parts[name][1] for name in {names[tag] for tag in row["label"]} if name in parts}

    def label_reading(self, rows: list[Row], config: Any) -> LabelReading:
        return read_labels(labels_in(rows), config)

    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        return class_head(tag for tags in require_labels(rows) for tag in tags)

    def _check_named(self, names: list[str]) -> None:
        """Refuse tags without names, in which every word would be an entity."""
        if self.metric_name != "token_accuracy" and are_unnamed(names):
            raise DataError(
                f"expected tags with names (B-PER, I-PER, O …), in which entities are seen, found {names[0]} to "
                f"{names[-1]}; give data that name them (Parquet of a `datasets` data set, or names as text), write "
                "them into id2label of the model's config.json, or set model.metric: token_accuracy"
            )

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        return token_lengths(processor, [{"text": " ".join(row["words"])} for row in rows])

    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        examples, _ = tokenize_words(data.processor, data.rows, data.max_length)
        return data.tensors(examples, sort=sort)

    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """``labels`` [1, length]: a word's class at its first token, -100 elsewhere."""
        tagged = labels_of(rows)
        examples, first_tokens = tokenize_words(processor, rows, max_length)
        if tagged is None:
            return training_examples(examples)
        _check_names(rows)
        labels = [[IGNORED] * len(example["input_ids"]) for example in examples]
        for target, tags, firsts in zip(labels, tagged, first_tokens, strict=True):
            for word, token in firsts.items():
                target[token] = tags[word]
        return training_examples(examples, labels)

    def label_scores(self, outcomes: Outcomes, config: Any) -> dict[str, float]:
        return type_f1(outcomes)

    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        _check_names(data.rows)
        names: list[str] = data.rows[0]["label_names"]
        examples, first_tokens = tokenize_words(data.processor, data.rows, data.max_length)
        predicted = [["O"] * len(row["words"]) for row in data.rows]
        for indices, inputs in data.batches(examples):
            classes = function(inputs)["logits"].argmax(axis=-1)  # [batch, length]
            for position, index in enumerate(indices):
                size = len(examples[index]["input_ids"])
                tokens = classes[position, unpadded(size, classes.shape[1], data.processor)]
                for word, token in first_tokens[index].items():
                    predicted[index][word] = names[int(tokens[token])]
        truth = [[names[tag] for tag in row["label"]] for row in data.rows]
        return _entity_outcomes(truth, predicted, TagScheme({}) if are_unnamed(names) else TagScheme.of(names))

    def scores(self, outcomes: Outcomes) -> dict[str, float]:
        found = super().scores(outcomes)
        sees_entities = outcomes.names or self.metric_name != "token_accuracy"
        return found if sees_entities else {"token_accuracy": found["token_accuracy"]}

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        """Texts of one word that is an entity of the most frequent or the metric's type, found in one of them."""
        words = {"right_words": np.array([1, 0]), "words": np.array([1, 1])}
        return Outcomes({**right_and_wrong_entity(outcomes, label_number(self.metric_name, outcomes)), **words})

    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Logits [tokens, classes] of every token that is no padding."""
        return outputs["logits"][batch["attention_mask"].bool()]


def _check_names(rows: list[Row]) -> None:
    if not all("label_names" in row for row in rows):
        raise DataError("expected rows with checked tags, found others; pass the rows that check_labels returned")


def _entity_outcomes(truth: list[list[str]], predicted: list[list[str]], scheme: TagScheme) -> Outcomes:
    """Entities of each text, by type.

    ``right``, ``found`` and ``expected`` [texts, types] entities; ``right_words`` and ``words`` [texts].
    """
    expected, found = ([scheme.entities(tags) for tags in texts] for texts in (truth, predicted))
    right = [a & b for a, b in zip(expected, found, strict=True)]
    types = sorted({kind for _, kind in scheme.parts.values()})
    hits = [sum(a == b for a, b in zip(one, other, strict=True)) for one, other in zip(truth, predicted, strict=True)]
    return Outcomes(
        {
            **{name: _by_type(each, types) for name, each in (("right", right), ("found", found))},
            "expected": _by_type(expected, types),
            "right_words": np.array(hits),
            "words": np.array([len(tags) for tags in truth]),
        },
        names=tuple(types),
    )


def _by_type(texts: list[set[tuple[str, int, int]]], types: list[str]) -> np.ndarray:
    """Numbers of entities [texts, types]."""
    counted = [Counter(kind for kind, _, _ in entities) for entities in texts]
    return np.array([[count[kind] for kind in types] for count in counted], dtype=np.int64).reshape(len(texts), -1)


def tokenize_words(processor: Any, rows: list[Row], max_length: int) -> tuple[list[Example], list[dict[int, int]]]:
    """Truncated inputs, and for each example the first token of each word, {word index: token index}.

    The words are joined by spaces and found again by offsets: unlike ``is_split_into_words`` this also works with
    byte-level tokenizers that were loaded without ``add_prefix_space``. The leading space makes the first word like
    the others; tokenizers that strip spaces are not affected.
    """
    require_fast(processor, "token-classification")
    texts = [" " + " ".join(row["words"]) for row in rows]
    encoded = encode(
        processor,
        texts,
        truncation=True,
        max_length=length_limit(processor, max_length),
        padding=False,
        return_attention_mask=True,
        return_offsets_mapping=True,
    )
    offsets = encoded["offset_mapping"]
    firsts = [_first_tokens(row["words"], spans) for row, spans in zip(rows, offsets, strict=True)]
    return split_examples(encoded, processor, texts), firsts


def _first_tokens(words: list[str], offsets: list[tuple[int, int]]) -> dict[int, int]:
    owner: list[int] = []  # word index of every character of the joined text; a space belongs to the word behind it
    for index, text in enumerate(words):
        owner += [index] * (1 + len(text))
    firsts: dict[int, int] = {}
    for token, (start, end) in enumerate(offsets):
        if end > start:
            firsts.setdefault(owner[end - 1], token)  # the last character: a token may begin with the space
    return firsts
