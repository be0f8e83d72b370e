"""Tiny language models that rank pairs by yes and no, as Qwen3-Reranker does, and what they say by its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import (  # type: ignore[import-untyped, unused-ignore]
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
)
from torch import nn

from tests.helpers.models import VOCABULARY, shaken, tiny_causal_config

SPECIAL = ("<|im_start|>", "<|im_end|>")
SPELLED = ("yes", "no", "judge", "instruct", "query", "document", "system", "user", "assistant", "<", ">", ">:", "</")
DIGITS = ("0", "1", "2", "3", "4")  # with which sentence-transformers finds the end of a template
# As the model card writes them.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TASK = "Given a web search query, retrieve relevant passages that answer the query"
# As folders for sentence-transformers have it.
CHAT_TEMPLATE = (
    "{{- '" + PREFIX.replace("\n", "\\n") + "' -}}\n"
    '{%- set task = messages | selectattr("role", "eq", "system") | map(attribute="content") | first '
    "| default('" + TASK + "') -%}\n"
    "{{- '<Instruct>: ' + task -}}\n"
    '{{- \'\\n<Query>: \' + (messages | selectattr("role", "eq", "query") | map(attribute="content") | first) -}}\n'
    '{{- \'\\n<Document>: \' + (messages | selectattr("role", "eq", "document") | map(attribute="content") '
    "| first) -}}\n"
    "{{- '" + SUFFIX.replace("\n", "\\n") + "' -}}"
)
PAIRS = [
    ("who sat ?", "the cat sat on a mat"),
    ("who ran under the tree ?", "a dog ran ."),
    ("who ran ?", " ".join(["the cat sat on the mat under a tree ."] * 6)),
    ("who ?", "a"),
    ("a dog", "the dog sat on a dog , a cat ran under the dog"),
]


def words_tokenizer(padding_side: str = "left", without: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words and of the special tokens of chats; no tokens are added to a text."""
    words = [*VOCABULARY, *SPELLED, *DIGITS, *SPECIAL]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=200,
        padding_side=padding_side,
        **{name: token for name, token in special.items() if name not in without},
    )


def save_reranker(
    folder: Path, model_type: str = "qwen3", padding_side: str = "left", auto_class: str = "CausalLM", **changes: Any
) -> nn.Module:
    """Write a tiny random model with its tokenizer as transformers does; returns the model."""
    sizes = {"vocab_size": len(words_tokenizer()), "max_position_embeddings": 256}
    if model_type == "llama":
        sizes["hidden_size"] = 64  # heads as wide as the fused attention takes
    config = tiny_causal_config(model_type, **{**sizes, "tie_word_embeddings": True, **changes})
    torch.manual_seed(0)
    model = shaken(getattr(transformers, f"AutoModelFor{auto_class}").from_config(config), 0)
    model.save_pretrained(folder)  # type: ignore[operator]
    words_tokenizer(padding_side).save_pretrained(folder)
    return model


def by_model_card(folder: Path, pairs: list[tuple[str, str]], max_length: int, instruction: str = TASK) -> np.ndarray:
    """Chance of yes against no ``[pairs]``, as the model card computes it."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
    texts = [f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}" for query, document in pairs]
    limit = max_length - len(prefix) - len(suffix)
    bodies = tokenizer(texts, truncation="longest_first", max_length=limit, return_attention_mask=False)["input_ids"]
    inputs = tokenizer.pad({"input_ids": [prefix + body + suffix for body in bodies]}, return_tensors="pt")
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, -1]
    chances = torch.nn.functional.log_softmax(torch.stack([logits[:, no], logits[:, yes]], dim=1), dim=1)
    return chances[:, 1].exp().numpy()  # type: ignore[no-any-return]
