"""What the GGUF format cannot hold is refused by name, and nothing is written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from exporters import ExportError, GgufSettings, export_gguf
from exporters.decoder_parts import DecoderParts, LinearPart
from tests.helpers.gguf_models import byte_level_tokenizer, parts_of, tiny_llama

pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")

SETTINGS = GgufSettings("tiny")


@pytest.fixture(scope="module")
def parts() -> DecoderParts:
    return parts_of(tiny_llama())


def with_layer(parts: DecoderParts, **changes: Any) -> DecoderParts:
    """Changes in the second layer."""
    layers = list(parts.layers)
    layers[1] = dataclasses.replace(layers[1], **changes)
    return dataclasses.replace(parts, layers=tuple(layers))


def with_attention(parts: DecoderParts, **changes: Any) -> DecoderParts:
    return with_layer(parts, attention=dataclasses.replace(parts.layers[1].attention, **changes))


def with_feed_forward(parts: DecoderParts, **changes: Any) -> DecoderParts:
    return with_layer(parts, feed_forward=dataclasses.replace(parts.layers[1].feed_forward, **changes))


def with_norm(parts: DecoderParts, **changes: Any) -> DecoderParts:
    norm = parts.layers[1].attention_norm
    assert norm is not None
    return with_layer(parts, attention_norm=dataclasses.replace(norm, **changes))


def with_rotary(parts: DecoderParts, frequencies: torch.Tensor) -> DecoderParts:
    assert parts.rotary is not None
    return dataclasses.replace(parts, rotary=dataclasses.replace(parts.rotary, frequencies=frequencies))


def not_finite(parts: DecoderParts) -> DecoderParts:
    weight = parts.final_norm.weight.clone()
    weight[3] = torch.nan
    return dataclasses.replace(parts, final_norm=dataclasses.replace(parts.final_norm, weight=weight))


REFUSED: dict[str, Callable[[DecoderParts], DecoderParts]] = {
    "RMSNorm .* found LayerNorm": lambda parts: with_norm(parts, kind="layer"),
    "norms without bias": lambda parts: with_norm(parts, bias=torch.zeros(64)),
    "one epsilon for all norms .* found 1e-06, 0.1": lambda parts: with_norm(parts, epsilon=0.1),
    "a norm before every block": lambda parts: with_layer(parts, attention_norm=None),
    "rotary positions .* learned ones": lambda parts: dataclasses.replace(parts, positions=torch.zeros(128, 64)),
    "rotary positions .* found none": lambda parts: dataclasses.replace(parts, rotary=None),
    "rotary positions on whole heads .* 16 of 32": lambda parts: with_rotary(parts, torch.ones(8)),
    "positive, finite frequencies": lambda parts: with_rotary(parts, torch.zeros(16)),
    "one after the other .* same input in layer 1": lambda parts: with_layer(parts, parallel=True),
    "a gated feed-forward .* layer 1": lambda parts: with_feed_forward(parts, gate=None),
    "the activation silu .* gelu in layer 1": lambda parts: with_feed_forward(parts, activation="gelu"),
    "queries and keys without norms": lambda parts: with_attention(parts, query_norm=parts.final_norm),
    "a window of 64 tokens in layer 1.*shorten the context": lambda parts: with_attention(parts, window=64),
    "heads of one size .* 32 and 64": lambda parts: with_attention(parts, head_dim=64),
    "as many query heads for each cached head": lambda parts: with_attention(parts, n_heads=3),
    "a head without bias": lambda parts: dataclasses.replace(
        parts, head=LinearPart(parts.embedding, torch.zeros(len(parts.embedding)))
    ),
    r"shape \(144, 64\) for the head, found \(9, 64\)": lambda parts: dataclasses.replace(
        parts, head=LinearPart(torch.ones(9, 64))
    ),
    "finite weights .* found nan": not_finite,
    r"shape \(64, 64\) for the value in layer 1, found \(64, 32\)": lambda parts: with_attention(
        parts, value=LinearPart(torch.zeros(64, 32))
    ),
    r"shape \(96, 64\) for gate in layer 1": lambda parts: with_feed_forward(
        parts, gate=LinearPart(torch.zeros(32, 64))
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_the_format_cannot_hold(tmp_path: Path, parts: DecoderParts, message: str) -> None:
    with pytest.raises(ExportError, match=f"expected.*{message}"):
        export_gguf(REFUSED[message](parts), tmp_path / "model.gguf", byte_level_tokenizer(), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path, parts: DecoderParts) -> None:
    export_gguf(with_attention(parts, window=128), tmp_path / "model.gguf", byte_level_tokenizer(), SETTINGS)
    export_gguf(parts, tmp_path / "plain.gguf", byte_level_tokenizer(), SETTINGS)
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_weights_beyond_float16(tmp_path: Path, parts: DecoderParts) -> None:
    with pytest.raises(ExportError, match=r"up to 65504 .* in token_embd.weight, found 70000"):
        export_gguf(
            dataclasses.replace(parts, embedding=torch.full((144, 64), 7e4)),
            tmp_path / "model.gguf",
            byte_level_tokenizer(),
            SETTINGS,
        )
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path: Path, parts: DecoderParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'ziplm-deploy\[llamacpp\]'"):
        export_gguf(parts, tmp_path / "model.gguf", byte_level_tokenizer(), SETTINGS)


def with_byte_tokens(merges: list[tuple[str, str]], normalizer: Any) -> Any:
    vocabulary = {text: index for index, text in enumerate(["<unk>", "▁", "a", "b", "ab", "▁a", "<0x61>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    backend.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def without_a_merge() -> Any:
    return with_byte_tokens([("▁", "a")], normalizers.Prepend("▁"))


def of_other_spaces() -> Any:
    return with_byte_tokens([("▁", "a"), ("a", "b")], normalizers.NFKC())


def of_words() -> Any:
    backend = Tokenizer(models.WordLevel(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def split_at_spaces() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def lower_case() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_a_merge, "merges of all pairs"),
        (of_other_spaces, "only marks spaces with ▁, found the steps NFKC"),
        (of_words, "a BPE tokenizer on bytes, or with byte tokens, found WordLevel"),
        (split_at_spaces, "splits text like one of gpt-2, smollm, llama-bpe, qwen2, found another way"),
        (lower_case, "splits text like one of"),
        (object, "a fast tokenizer, found object"),
        (lambda: Path("nowhere"), "tokenizer.json at nowhere, found none"),
        (lambda: Path("nowhere.gguf"), "a GGUF file at nowhere.gguf"),
    ],
)
def test_tokenizers_that_cannot_be_written(
    tmp_path: Path, parts: DecoderParts, make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_gguf(parts, tmp_path / "model.gguf", make(), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_other_file_types(tmp_path: Path, parts: DecoderParts) -> None:
    wrong: Any = "Q3_K"
    with pytest.raises(ExportError, match="a file type of F16, Q8_0, Q4_0, found Q3_K"):
        export_gguf(parts, tmp_path / "model.gguf", byte_level_tokenizer(), GgufSettings("tiny", wrong))


def test_a_way_to_split_that_the_caller_names(tmp_path: Path, parts: DecoderParts) -> None:
    settings = GgufSettings("tiny", pre_tokenizer="starcoder")
    export_gguf(parts, tmp_path / "model.gguf", split_at_spaces(), settings)
    assert b"starcoder" in (tmp_path / "model.gguf").read_bytes()


def test_more_tokens_than_rows(tmp_path: Path, parts: DecoderParts) -> None:
    few = dataclasses.replace(parts, embedding=parts.embedding[:100], head=None)
    with pytest.raises(ExportError, match=r"token ids below 100 .* found 137"):
        export_gguf(few, tmp_path / "model.gguf", byte_level_tokenizer(), SETTINGS)
    export_gguf(parts, tmp_path / "other.gguf", byte_level_tokenizer(), SETTINGS)
    with pytest.raises(ExportError, match=r"expected 100 tokens .* found 144"):
        export_gguf(few, tmp_path / "model.gguf", tmp_path / "other.gguf", SETTINGS)
