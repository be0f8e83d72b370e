"""Pairs of a query and a document as a reranker reads them: as its tokenizer puts pairs together, or in a prompt."""

from __future__ import annotations

from typing import Any

from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.recipe.pair_prompt import PairPrompt
from ziplm_deploy.tasks.batching import Example, encode, length_limit, split_examples, token_lengths, tokenize
from ziplm_deploy.tasks.data import Row

_AS_TEXT: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}


def pair_prompt_of(model: ModelConfig) -> PairPrompt | None:
    """The prompt of a causal reranker; None where the tokenizer puts pairs together."""
    return PairPrompt.parse(model.pair_prompt, model.instruction) if model.pair_prompt else None


def tokenize_pairs(processor: Any, prompt: PairPrompt | None, rows: list[Row], max_length: int) -> list[Example]:
    """Unpadded inputs of rows with ``text``, the query, and ``text_pair``.

    In a prompt what is too long loses the end of the document, and keeps what follows it.

    Raises:
        RecipeError: the prompt alone fills ``max_length``.
    """
    if prompt is None:
        return tokenize(processor, rows, max_length)
    limit = length_limit(processor, max_length)
    bare = len(_encoded(processor, [prompt.text("", "")])[0]["input_ids"])
    if bare >= limit:
        raise RecipeError(
            f"expected requests of more than the {bare} tokens of model.pair_prompt without query and document, found "
            f"{limit}; raise environment.workload.seq_len"
        )
    tail = _encoded(processor, [prompt.tail])[0] if prompt.tail else {}
    examples = _encoded(processor, [prompt.text(row["text"], row["text_pair"]) for row in rows])
    return [_cut(example, tail, limit) for example in examples]


def pair_lengths(processor: Any, prompt: PairPrompt | None, rows: list[Row]) -> list[int]:
    """Tokens of rows with ``text`` and ``text_pair``, uncut."""
    if prompt is None:
        return token_lengths(processor, rows)
    examples = _encoded(processor, [prompt.text(row["text"], row["text_pair"]) for row in rows])
    return [len(example["input_ids"]) for example in examples]


def _encoded(processor: Any, texts: list[str]) -> list[Example]:
    encoded = encode(processor, texts, return_attention_mask=True, **_AS_TEXT)
    return split_examples(encoded, processor, texts)


def _cut(example: Example, tail: Example, limit: int) -> Example:
    """An example of at most ``limit`` tokens that ends as the prompt does."""
    if len(example["input_ids"]) <= limit:
        return example
    return {
        name: values[: limit - len(tail.get(name, []))] + list(tail.get(name, [])) for name, values in example.items()
    }
