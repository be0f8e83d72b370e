"""Rows of a data set with the way they go through a model: how long, how many in a call, padded to what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ziplm_deploy.tasks.batching import Arrays, Batch, Example, batch_indices, pad_batch, tokenize
from ziplm_deploy.tasks.data import Row

BATCH_SIZE = 32
TOKENS_AT_ONCE = 2048  # of a language model, in one call, padding included: each has logits of the whole vocabulary

ModelFunction = Callable[[Arrays], Arrays]  # named arrays in, named arrays out: an ONNX file, or torch_function()
Embeddings = dict[bytes, Arrays]  # by the batch that they are of

_EMBEDDINGS = {"sentence_embedding", "image_embeds"}

_Member = TypeVar("_Member")


@dataclass(frozen=True)
class EvaluationSet:
    """Rows of a data set, and how they go through a model in batches.

    Raises:
        ValueError: no batch can have such a size or length.
    """

    rows: list[Row]  # normalized, as Task.load_rows gives them
    processor: Any  # tokenizer or image processor
    max_length: int  # tokens, longer examples are cut; means nothing for images
    batch_size: int = BATCH_SIZE  # examples in a call
    pad_to: int | None = None  # tokens; every batch is then exactly [batch_size, pad_to], as static ONNX files take it

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1 example, found {self.batch_size}")
        if self.max_length < 0:
            raise ValueError(f"expected a max_length of no fewer than 0 tokens, found {self.max_length}")
        if self.pad_to is not None and self.pad_to < 1:
            raise ValueError(
                f"expected pad_to of at least 1 token, found {self.pad_to}; None pads each batch to its longest example"
            )

    def with_rows(self, rows: list[Row]) -> EvaluationSet:
        """A copy with other rows, which go through the model in the same way."""
        return dataclasses.replace(self, rows=rows)

    def tokenize(self) -> list[Example]:
        """Truncated, unpadded inputs of rows with ``text`` and perhaps ``text_pair``."""
        return tokenize(self.processor, self.rows, self.max_length)

    def tensors(self, examples: list[Example], *, sort: bool) -> list[Batch]:
        """All examples as padded batches, sorted by length or in the given order.

        The last may hold fewer than ``batch_size``, even with ``pad_to``.
        """
        return [
            pad_batch([examples[index] for index in group], self.processor, self.pad_to)
            for group in batch_indices(_lengths(examples), self.batch_size, sort=sort)
        ]

    def batches(self, examples: list[Example]) -> Iterator[tuple[list[int], Arrays]]:
        """Batches sorted by length, each with the indices of its examples: (indices, numpy inputs).

        With ``pad_to`` the last is filled up, see :meth:`fill_up`; the indices name only the rows that count.
        """
        for group in batch_indices(_lengths(examples), self.batch_size, sort=True):
            members = self.fill_up([examples[index] for index in group])
            padded = pad_batch(members, self.processor, self.pad_to)
            yield group, {name: value.numpy() for name, value in padded.items()}

    def fill_up(self, members: list[_Member]) -> list[_Member]:
        """Members of one batch; with ``pad_to`` exactly ``batch_size``, the last repeated as often as needed."""
        missing = 0 if self.pad_to is None else self.batch_size - len(members)
        return members + [members[-1]] * missing


def _lengths(examples: list[Example]) -> list[int]:
    return [len(example["input_ids"]) for example in examples]


def cache_embeddings(function: ModelFunction, known: Embeddings | None = None) -> ModelFunction:
    """Wrap a function so that what metric and fidelity both read is computed once a batch.

    That is embeddings, or scores of pairs. The answers are those of ``function``; for a batch that came
    before, these only.

    ``known``: what was computed before, and where new ones are kept.
    """
    known = {} if known is None else known

    def remembered(inputs: Arrays) -> Arrays:
        key = b"".join(inputs[name].tobytes() for name in sorted(inputs))
        if key in known:
            return known[key]
        outputs = function(inputs)
        embedded = outputs.keys() & _EMBEDDINGS
        if embedded:  # other outputs may be vocabulary-wide
            known[key] = {name: outputs[name] for name in embedded}
        elif "logits" in outputs and outputs["logits"].shape[1:] == (1,):
            known[key] = {"logits": outputs["logits"]}
        return outputs

    return remembered
