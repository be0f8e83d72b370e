"""GGUF files of pruned models of the Llama kind: llama.cpp gives the answers of plain torch; other kinds are refused.

Weights of the tiny models are float16 numbers, so a file in F16 holds them as they are: what differs is that llama.cpp
multiplies activations in float16, too. In Q8_0 and Q4_0 torch gets the rounded weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters import GgufSettings, export_gguf
from exporters.decoder_parts import AttentionPart, DecoderParts, DroppedPart, LayerPart, LinearPart
from tests.helpers.gguf_models import (
    LlamaCpp,
    byte_level_tokenizer,
    constant,
    cut_columns,
    cut_heads,
    distance,
    log_probabilities,
    parts_of,
    rounded,
    shortfall,
    tiny_llama,
)

gguf = pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")

PROMPT = [5, 77, 129, 9, 100, 31, 8]
# Largest difference of log-probabilities, activations in float16 (F16) or in blocks of int8 (Q8_0, Q4_0).
TOLERANCE = {"F16": 5e-3, "Q8_0": 0.1, "Q4_0": 0.1}
NOTHING = DroppedPart()

Change = Callable[[list[LayerPart]], None]


def replaced(index: int, **blocks: Any) -> Change:
    """Put other blocks into one layer."""

    def change(layers: list[LayerPart]) -> None:
        layers[index] = dataclasses.replace(layers[index], **blocks)

    return change


def every(**blocks: Any) -> Change:
    def change(layers: list[LayerPart]) -> None:
        layers[:] = [dataclasses.replace(layer, **blocks) for layer in layers]

    return change


def groups(layers: list[LayerPart]) -> None:
    layers[0], layers[2] = cut_heads(layers[0], [1]), cut_heads(layers[2], [0])


def widths(layers: list[LayerPart]) -> None:
    layers[:] = [cut_columns(layer, width) for layer, width in zip(layers, (50, 7, 64), strict=True)]


def mixture(layers: list[LayerPart]) -> None:
    layers[0] = dataclasses.replace(cut_columns(layers[0], 33), attention=constant(1))
    layers[1] = dataclasses.replace(cut_heads(layers[1], [1]), feed_forward=constant(2))
    layers[2] = dataclasses.replace(layers[2], attention=NOTHING)


CASES: dict[str, Change] = {
    "dense": lambda layers: None,
    "groups": groups,
    "widths": widths,
    "no first attention": replaced(0, attention=NOTHING),
    "first attention a constant": replaced(0, attention=constant(1)),
    "no middle attention": replaced(1, attention=NOTHING),
    "middle attention a constant": replaced(1, attention=constant(1)),
    "no last attention": replaced(2, attention=NOTHING),
    "no first feed-forward": replaced(0, feed_forward=NOTHING),
    "middle feed-forward a constant": replaced(1, feed_forward=constant(2)),
    "no last feed-forward": replaced(2, feed_forward=NOTHING),
    "first layer two constants": replaced(0, attention=constant(1), feed_forward=constant(2)),
    "no middle layer": replaced(1, attention=NOTHING, feed_forward=NOTHING),
    "no attention": every(attention=NOTHING),
    "nothing": every(attention=NOTHING, feed_forward=NOTHING),
    "mixture": mixture,
}


def pruned(change: Change, model_type: str = "llama", **changes: Any) -> DecoderParts:
    parts = parts_of(tiny_llama(model_type, **changes))
    layers = list(parts.layers)
    change(layers)
    return dataclasses.replace(parts, layers=tuple(layers))


def exported(parts: DecoderParts, path: Path, settings: GgufSettings | None = None) -> LlamaCpp:
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")
    export_gguf(parts, path, byte_level_tokenizer(), settings or GgufSettings("tiny"))
    return LlamaCpp(path)


def assert_same_answers(parts: DecoderParts, engine: LlamaCpp, tolerance: float) -> None:
    """First log-probabilities are near, and no token of the greedy continuation is less likely than another."""
    tokens, first = engine.complete(PROMPT, 12)
    assert len(tokens) == 12
    assert distance(parts, PROMPT, first) < tolerance
    assert shortfall(parts, PROMPT, tokens) < 2 * tolerance


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_reference_is_transformers(model_type: str) -> None:
    model = tiny_llama(model_type)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1], dim=-1)
    torch.testing.assert_close(log_probabilities(parts_of(model), PROMPT), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # the latter with biases of query, key and value
def test_answers_are_those_of_torch(tmp_path: Path, case: str, model_type: str) -> None:
    parts = pruned(CASES[case], model_type)
    assert_same_answers(parts, exported(parts, tmp_path / "model.gguf"), TOLERANCE["F16"])


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("case", ["dense", "mixture", "widths"])
def test_quantized_answers_are_those_of_rounded_weights(tmp_path: Path, case: str, file_type: Any) -> None:
    parts = pruned(CASES[case])
    settings = GgufSettings("tiny", file_type, head_type=file_type)
    engine = exported(parts, tmp_path / "model.gguf", settings)
    assert_same_answers(rounded(parts, file_type), engine, TOLERANCE[file_type])


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "head_dim": 64},
        {"hidden_size": 80},  # no multiple of 32
        {"max_position_embeddings": 512},
    ],
    ids=str,
)
def test_other_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = pruned(CASES["no middle attention"], **changes)
    assert_same_answers(parts, exported(parts, tmp_path / "model.gguf"), TOLERANCE["F16"])


ROTARY = {
    "base": {"rope_type": "default", "rope_theta": 1234.5},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500000.0,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_scaled_positions(tmp_path: Path, kind: str) -> None:
    parts = pruned(CASES["dense"])
    frequencies = _frequencies(ROTARY[kind], 32)
    assert parts.rotary is not None
    parts = dataclasses.replace(parts, rotary=dataclasses.replace(parts.rotary, frequencies=frequencies, scale=1.1))
    assert_same_answers(parts, exported(parts, tmp_path / "model.gguf"), TOLERANCE["F16"])


def _frequencies(rotary: dict[str, Any], head_dim: int) -> torch.Tensor:
    """Frequencies of transformers for such settings."""
    model = tiny_llama(head_dim=head_dim, **_rotary_settings(rotary))
    return model.model.rotary_emb.inv_freq


def _rotary_settings(rotary: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 and 5 spell them."""
    return {"rope_parameters": rotary, "rope_scaling": rotary, "rope_theta": rotary["rope_theta"]}


def test_another_scale_of_attention(tmp_path: Path) -> None:
    parts = pruned(CASES["groups"])
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, scale=0.4))
        for layer in parts.layers
        if isinstance(layer.attention, AttentionPart)
    )
    parts = dataclasses.replace(parts, layers=layers)
    assert_same_answers(parts, exported(parts, tmp_path / "model.gguf"), TOLERANCE["F16"])


def test_types_of_the_file(tmp_path: Path) -> None:
    """What has rows of other than whole blocks stays in float16 and is named; Q4_0 keeps the embedding in Q8_0."""
    parts = pruned(CASES["mixture"], head_dim=16)
    path = tmp_path / "model.gguf"
    kept = export_gguf(cut_to_one_head(parts), path, byte_level_tokenizer(), GgufSettings("tiny", "Q4_0"))
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name for name, kind in types.items() if kind == "F16"} == set(kept)
    assert "blk.1.attn_output.weight" in kept
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert export_gguf(parts, path, byte_level_tokenizer(), GgufSettings("tiny")) == ()


def cut_to_one_head(parts: DecoderParts) -> DecoderParts:
    """The model with one query head, 16 wide, on the cached one of its second layer."""
    layers = list(parts.layers)
    part = layers[1].attention
    assert isinstance(part, AttentionPart)
    part = dataclasses.replace(
        part,
        query=LinearPart(part.query.weight[:16]),
        output=LinearPart(part.output.weight[:, :16], part.output.bias),
        n_heads=1,
    )
    layers[1] = dataclasses.replace(layers[1], attention=part)
    return dataclasses.replace(parts, layers=tuple(layers))


def test_padded_columns_are_zeros(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    parts = pruned(CASES["widths"])
    export_gguf(parts, path, byte_level_tokenizer(), GgufSettings("tiny"))
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    assert [tensors[f"blk.{index}.ffn_down.weight"].shape[1] for index in range(3)] == [64, 32, 64]
    assert not tensors["blk.1.ffn_down.weight"][:, 7:].any()
    assert tensors["blk.1.ffn_up.weight"][:7].all()
    assert not tensors["blk.1.ffn_up.weight"][7:].any()
