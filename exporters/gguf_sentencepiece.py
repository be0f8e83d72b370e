"""BPE tokenizers of SentencePiece's kind (Llama 2, TinyLlama, Mistral) as llama.cpp's kind ``llama``.

Hugging Face merges pairs by their rank in a list. llama.cpp has no list: it merges any two neighbours that are a token
together, that of the best score first. Both do the same where the list holds every such pair, ordered by what they
become, as lists made from SentencePiece models are; then a token's score is minus its place in that order.

llama.cpp puts a space before every stretch of text between special tokens, or before none. Llama 2's ``tokenizer.json``
says so, too (a normalizer that prepends it). Metaspace differs from that in text that starts with a space, to which it
adds none, and with ``first`` after special tokens: converters of llama.cpp do not care, and neither does this one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from exporters.encoder import ExportError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"


def is_sentencepiece(described: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is of this kind: BPE that falls back to byte tokens."""
    model = described["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def token_scores(described: Mapping[str, Any]) -> dict[int, float]:
    """Scores of all tokens that merges make, by id.

    Raises:
        ExportError: the merges are not those of a SentencePiece model.
    """
    vocabulary: Mapping[str, int] = described["model"]["vocab"]
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in described["model"]["merges"]]
    made = [first + second for first, second in merges]
    order = list(dict.fromkeys(made))  # as they first appear
    added = {each["content"] for each in described["added_tokens"]}
    plain = {text for text in vocabulary if text not in added and not is_byte(text)}
    if not _grouped(made) or set(merges) != set(pairs_of(plain)):
        raise ExportError(
            "expected merges of all pairs that are a token together, ordered by that token (a SentencePiece model's), "
            "found others; give the GGUF file of the same model, whose tokenizer is copied"
        )
    return {vocabulary[text]: -float(place + 1) for place, text in enumerate(order)}


def has_space_prefix(steps: list[dict[str, Any]]) -> bool:
    """Whether a space goes before the text.

    Args:
        steps: normalizers and pre-tokenizers of ``tokenizer.json``, flat.

    Raises:
        ExportError: steps other than a space in front and ``▁`` in place of spaces.
    """
    known = ({"type": "Prepend", "prepend": _SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    others = [step for step in steps if step not in known]
    marks = [step for step in others if step["type"] == "Metaspace" and step.get("replacement") == _SPACE]
    if others != marks or len(marks) > 1:
        names = ", ".join(step["type"] for step in others)
        raise ExportError(
            f"expected a tokenizer that only marks spaces with {_SPACE}, found the steps {names}; give the GGUF file "
            "of the same model, whose tokenizer is copied"
        )
    return known[0] in steps or any(mark["prepend_scheme"] != "never" for mark in marks)


def pairs_of(texts: Collection[str]) -> Iterator[tuple[str, str]]:
    """All pairs of texts that are another one together; in the order of ``texts``, by that one."""
    known = set(texts)
    for text in texts:
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                yield text[:cut], text[cut:]


def is_byte(text: str) -> bool:
    """Whether a token stands for one byte."""
    return _BYTE.fullmatch(text) is not None


def _grouped(made: list[str]) -> bool:
    """Whether equal texts stand side by side."""
    return len(list(itertools.groupby(made))) == len(set(made))
