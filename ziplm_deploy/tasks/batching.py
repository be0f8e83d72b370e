"""Tokenized examples as padded batches, dynamic for torch or of one fixed shape for static ONNX files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.losses import IGNORED

Example = dict[str, list[int]]  # input name -> token values, unpadded
Batch = dict[str, Tensor]  # model input or label -> tensor [batch, …]
Arrays = dict[str, np.ndarray]  # the same for ONNX files

MAX_NAMED = 5  # examples in a message

_Values = TypeVar("_Values", Tensor, np.ndarray)


def encode(processor: Any, *texts: Any, **settings: Any) -> Any:
    """What a tokenizer makes of texts; its own truncation and padding stay, which a call sets and a save would keep."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return processor(*texts, **settings)
    truncation, padding = backend.truncation, backend.padding
    try:
        return processor(*texts, **settings)
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is None:
            backend.no_padding()
        else:
            backend.enable_padding(**padding)


def tokenize(processor: Any, rows: list[Row], max_length: int) -> list[Example]:
    """Truncated, unpadded inputs of rows with ``text`` and perhaps ``text_pair``, by the tokenizer's input names."""
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if rows and rows[0].get("text_pair") is not None else None
    limit = length_limit(processor, max_length)
    encoded = encode(
        processor, texts, pairs, truncation=True, max_length=limit, padding=False, return_attention_mask=True
    )
    return split_examples(encoded, processor, texts)


def token_lengths(processor: Any, rows: list[Row]) -> list[int]:
    """Tokens of rows with ``text`` and perhaps ``text_pair``, uncut."""
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if rows and rows[0].get("text_pair") is not None else None
    encoded = encode(processor, texts, pairs, truncation=False, verbose=False)["input_ids"]
    _require_tokens(encoded, texts)
    return [len(ids) for ids in encoded]


def _require_tokens(encoded: list[list[int]], texts: list[str]) -> None:
    """Raise :class:`DataError` for texts without tokens, which no model takes; says where they stand."""
    empty = [number for number, ids in enumerate(encoded, 1) if not ids]
    if empty:
        numbers = ", ".join(map(str, empty[:MAX_NAMED])) + (", …" if len(empty) > MAX_NAMED else "")
        raise DataError(
            f"expected tokens in every text, found none in {len(empty)} of the {len(texts)} examples that were taken "
            f"(number {numbers}: {texts[empty[0] - 1]!a:.80}; this tokenizer adds no special tokens); "
            "remove blank rows"
        )


def fitted(inputs: Mapping[str, _Values], wanted: Collection[str]) -> dict[str, _Values]:
    """What a model or graph takes of a batch's inputs.

    Where it wants token types and the tokenizer gives none, they are 0: all tokens are of one segment.
    """
    chosen = {name: value for name, value in inputs.items() if name in wanted}
    if "token_type_ids" in wanted and "token_type_ids" not in chosen and "input_ids" in inputs:
        chosen["token_type_ids"] = inputs["input_ids"] * 0
    return chosen


def length_limit(processor: Any, max_length: int) -> int:
    """``max_length`` in tokens, but never more than the tokenizer says that the model takes."""
    return min(max_length, int(processor.model_max_length))


def split_examples(encoded: Any, processor: Any, texts: list[str]) -> list[Example]:
    """One dictionary an example from a tokenizer's column-wise answer, with model inputs only.

    Raises:
        DataError: one of the ``texts`` has no tokens, which no model takes; shows it.
    """
    _require_tokens(encoded["input_ids"], texts)
    names = [name for name in processor.model_input_names if name in encoded]
    return [{name: encoded[name][index] for name in names} for index in range(len(encoded["input_ids"]))]


def require_fast(processor: Any, task: str) -> None:
    """Raise :class:`DataError` unless the tokenizer can tell where in the text a token stood."""
    if not getattr(processor, "is_fast", False):
        raise DataError(
            f"expected a fast tokenizer (tokenizer.json) for {task}, found {type(processor).__name__}; save the model "
            "again with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )


def batch_indices(lengths: list[int], batch_size: int, *, sort: bool) -> list[list[int]]:
    """Positions of the examples of every batch; sorted by length (stable) or in the given order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if sort else list(range(len(lengths)))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_batch(examples: list[Example], processor: Any, pad_to: int | None) -> Batch:
    """Tensors [len(examples), longest or pad_to], int64, padded on the tokenizer's side.

    Raises:
        ValueError: an example is longer than ``pad_to``.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    if pad_to is not None and longest > pad_to:
        raise ValueError(f"expected examples of at most {pad_to} tokens (pad_to), found {longest}; raise pad_to or cut")
    length = longest if pad_to is None else pad_to
    return {
        name: _padded([torch.tensor(example[name], dtype=torch.int64) for example in examples], name, length, processor)
        for name in examples[0]
    }


def _padded(rows: list[Tensor], name: str, length: int, processor: Any) -> Tensor:
    """One tensor [len(rows), length] of rows [≤ length], filled up as suits the model input or label ``name``."""
    fillers = {
        "input_ids": processor.pad_token_id or 0,
        "token_type_ids": processor.pad_token_type_id,
        "labels": IGNORED,
    }
    padded = torch.full((len(rows), length), fillers.get(name, 0), dtype=rows[0].dtype)  # [batch, length]
    for target, values in zip(padded, rows, strict=True):
        target[unpadded(len(values), length, processor)] = values
    return padded


def filled_up(example: Example, length: int, processor: Any) -> Example:
    """An example of ``length`` tokens of which all count, those of padding at its end, too: as SigLIP reads texts."""
    fillers = {"input_ids": processor.pad_token_id or 0, "attention_mask": 1}
    return {name: values + [fillers.get(name, 0)] * (length - len(values)) for name, values in example.items()}


def training_examples(
    examples: list[Example], labels: list[Any] | None = None, label_name: str = "labels"
) -> list[Batch]:
    """Unpadded tensors [1, length] of every example, int64, and its label if there are any.

    A label that is a list (of ints, one a token) becomes [1, length]; an int or float becomes [1], int64 or float32.
    """
    # torch.tensor of lists, not views of one large tensor: a view is pickled with all of its storage
    batches = [
        {name: torch.tensor([values], dtype=torch.int64) for name, values in example.items()} for example in examples
    ]
    return batches if labels is None else with_labels(batches, labels, label_name)


def with_labels(examples: list[Batch], labels: list[Any], label_name: str = "labels") -> list[Batch]:
    """Examples with one label each, see :func:`training_examples`."""
    dtype = torch.float32 if labels and isinstance(labels[0], float) else torch.int64
    return [
        {**each, label_name: torch.tensor([label], dtype=dtype)} for each, label in zip(examples, labels, strict=True)
    ]


def collate_examples(examples: list[Batch], processor: Any) -> Batch:
    """One batch of training examples: what has a token axis ([1, length]) is padded, all else is put together.

    Raises:
        DataError: an example has other inputs or labels than the first.
    """
    names = examples[0].keys()
    for number, example in enumerate(examples):
        if example.keys() != names:
            raise DataError(
                f"expected {', '.join(names)} in every training example, as in the first of the batch, found "
                f"{', '.join(example)} in its number {number}; label all training rows or none"
            )
    batch: Batch = {}
    for name in names:
        parts = [example[name] for example in examples]
        if parts[0].dim() == 2:
            length = max(part.shape[1] for part in parts)
            batch[name] = _padded([part[0] for part in parts], name, length, processor)  # [batch, longest]
        else:
            batch[name] = torch.cat(parts)  # labels [batch]; images [batch, channels, height, width]
    return batch


def unpadded(size: int, length: int, processor: Any) -> slice:
    """Slice of a row padded to ``length`` in which the ``size`` tokens of an example stand."""
    return slice(length - size, length) if processor.padding_side == "left" else slice(0, size)


def rows_that_count(x: Tensor, mask: Tensor) -> Tensor:
    """Rows [tokens, features] of ``x`` where ``mask``, bool [batch, length], holds.

    ``x`` is [batch, length, features], or [batch * length, features], as OPT lays out what enters its FFNs.
    """
    return x.reshape(*mask.shape, -1)[mask]


def as_float32(array: np.ndarray) -> np.ndarray:
    """The array in float32; a copy only if it has another type."""
    return np.asarray(array, dtype=np.float32)
