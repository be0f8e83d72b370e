"""Tokenizers in GGUF files: llama.cpp makes the tokens that the tokenizer itself makes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from exporters import GgufSettings, export_gguf
from exporters.decoder_parts import DecoderParts, LinearPart
from exporters.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_of
from tests.helpers.gguf_models import (
    END,
    END_ID,
    SPACES,
    LlamaCpp,
    byte_level_tokenizer,
    distance,
    parts_of,
    sentencepiece_like,
    tiny_llama,
)

gguf = pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")

TEXTS = [
    "the cat's 12 and 123 and 1234, then  12\n\n the end",
    f"a{END}the <word>the\n 12",
    "\n\n\n  the\tTHE'S it's !!\n\n",
]


@pytest.fixture(scope="module")
def parts() -> DecoderParts:
    return parts_of(tiny_llama())


def written(parts: DecoderParts, path: Path, source: Any) -> dict[str, Any]:
    """Keys of a file with this tokenizer."""
    export_gguf(parts, path, source, GgufSettings("tiny"))
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, parts: DecoderParts, name: str, start: bool) -> None:
    """After the same tokens it has the same first log-probabilities, and after others it has not."""
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    tokenizer = byte_level_tokenizer(name, start)
    assert written(parts, tmp_path / "model.gguf", tokenizer)["tokenizer.ggml.pre"] == name
    engine = LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert (ids[0] == END_ID) == start
        assert engine.complete(text, 1)[1] == pytest.approx(engine.complete(ids, 1)[1], abs=1e-4)
        assert engine.complete(text, 1)[1] != pytest.approx(engine.complete(ids[1:], 1)[1], abs=1e-4)


def test_ways_to_split_differ() -> None:
    """So the test above can tell them apart."""
    found = [tuple(byte_level_tokenizer(name)(text)["input_ids"] for text in TEXTS) for name in PRE_TOKENIZERS]
    assert all(found[index] != other for index in range(len(found)) for other in found[:index])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ways_to_split_are_recognized(name: str) -> None:
    described = json.loads(byte_level_tokenizer(name).backend_tokenizer.to_str())
    assert pre_tokenizer_of(described) == name
    described["model"]["ignore_merges"] = not described["model"]["ignore_merges"]
    assert pre_tokenizer_of(described) is None or name not in ("llama-bpe", pre_tokenizer_of(described))


def test_keys_of_a_file(tmp_path: Path, parts: DecoderParts) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    keys = written(parts, tmp_path / "model.gguf", tokenizer)
    kinds = gguf.TokenType
    assert keys["tokenizer.ggml.tokens"][END_ID - 1 :] == [
        "ĠĠ",
        END,
        "<word>",
        *(f"[PAD{id}]" for id in range(138, 144)),
    ]
    assert keys["tokenizer.ggml.token_type"][END_ID - 1 :] == [
        kinds.NORMAL,
        kinds.CONTROL,
        kinds.USER_DEFINED,
        *[kinds.UNUSED] * 6,
    ]
    assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.padding_token_id"] == END_ID
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.unknown_token_id" not in keys


def test_copies_and_folders_give_the_same_keys(tmp_path: Path, parts: DecoderParts) -> None:
    tokenizer = byte_level_tokenizer("qwen2", start=True)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "folder")
    given = written(parts, tmp_path / "model.gguf", tokenizer)
    assert written(parts, tmp_path / "copy.gguf", tmp_path / "model.gguf") == given
    assert written(parts, tmp_path / "loaded.gguf", tmp_path / "folder") == given


@pytest.mark.parametrize("spaces", SPACES)
def test_sentencepiece_in_llama_cpp(tmp_path: Path, spaces: str) -> None:
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    parts = parts_of(tiny_llama(vocab_size=288))
    assert parts.head is not None
    weight = parts.head.weight.clone()
    weight[3:259] = 0  # llama.cpp's server does not answer with bytes that are no character
    parts = dataclasses.replace(parts, head=LinearPart(weight))
    tokenizer = sentencepiece_like(spaces)
    keys = written(parts, tmp_path / "model.gguf", tokenizer)
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    engine = LlamaCpp(tmp_path / "model.gguf")
    texts = ["the thing and the ant", "and      thinking, in! Ωx\n", "an</s>the thing"]
    # Metaspace has no second space in front of one, llama.cpp has.
    for text in texts if spaces == "always" else [*texts, "  the thing", "an</s> the"]:
        ids = tokenizer(text)["input_ids"]
        assert engine.complete(text, 1)[1] == pytest.approx(engine.complete(ids, 1)[1], abs=1e-4), text
        assert engine.complete(text, 1)[1] != pytest.approx(engine.complete(ids[1:], 1)[1], abs=1e-4)


def test_a_file_that_is_only_timed_has_tokens_that_mean_nothing(tmp_path: Path, parts: DecoderParts) -> None:
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    tokens = written(parts, tmp_path / "model.gguf", None)["tokenizer.ggml.tokens"]
    assert tokens == [f"token {index}" for index in range(len(parts.embedding))]
    found, likeliest = LlamaCpp(tmp_path / "model.gguf").complete([5, 40, 41], 3)
    assert len(found) == 3
    assert distance(parts, [5, 40, 41], likeliest) < 5e-3
