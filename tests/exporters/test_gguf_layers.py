"""File layers are the model's own, whichever blocks were dropped; rotary keys give the frequencies back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.decoder_parts import AttentionPart, DecoderParts, DroppedPart, LayerPart, NormPart, RotaryPart
from exporters.gguf_layers import FileLayer, file_layers, interleaved, rotary_keys
from tests.helpers.gguf_models import constant, log_probabilities, parts_of, tiny_llama

PROMPT = [5, 77, 129, 9, 100]
PARTS = parts_of(tiny_llama(num_hidden_layers=4))


def read_back(layer: FileLayer) -> LayerPart:
    """A file layer as a layer of a model; what has no tensors is a dropped block."""
    norms = (
        None if weight is None else NormPart("rms", weight, PARTS.final_norm.epsilon)
        for weight in (layer.attention_norm, layer.feed_forward_norm)
    )
    attention_norm, feed_forward_norm = norms
    return LayerPart(
        attention_norm, layer.attention or DroppedPart(), feed_forward_norm, layer.feed_forward or DroppedPart()
    )


BLOCKS = st.sampled_from(["kept", "dropped", "constant"])


@given(st.lists(st.tuples(BLOCKS, BLOCKS), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_pattern_of_dropped_blocks_changes_the_answer(pattern: list[tuple[str, str]]) -> None:
    layers = []
    for index, (layer, kinds) in enumerate(zip(PARTS.layers, pattern, strict=False)):
        left = {"dropped": DroppedPart(), "constant": constant(index)}
        layers.append(
            dataclasses.replace(
                layer,
                attention=left.get(kinds[0], layer.attention),
                feed_forward=left.get(kinds[1], layer.feed_forward),
            )
        )
    found = file_layers(layers, 64, 32)
    assert isinstance(found[0].attention, AttentionPart)  # llama.cpp takes the model's head sizes from there
    assert all(layer.attention or layer.feed_forward for layer in found)
    assert len(found) <= max(len(layers), 1) + 1
    assert [layer.width % 32 for layer in found] == [0] * len(found)
    torch.testing.assert_close(_answer(read_back(each) for each in found), _answer(layers), atol=2e-5, rtol=0)


def _answer(layers: object) -> torch.Tensor:
    parts: DecoderParts = dataclasses.replace(PARTS, layers=tuple(layers))  # type: ignore[call-overload]
    return log_probabilities(parts, PROMPT)


def test_rows_are_paired() -> None:
    """Row i of the first half beside row i of the second, in each head."""
    rows = torch.arange(12.0)
    assert interleaved(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(interleaved(rows[:, None].repeat(1, 3), 2)[:, 1], interleaved(rows, 2))


@pytest.mark.parametrize("base", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0, 1234.5, 1e9])
@pytest.mark.parametrize("count", [8, 32, 64])
def test_plain_frequencies_are_a_base(base: float, count: int) -> None:
    frequencies = 1.0 / (base ** (torch.arange(0, 2 * count, 2, dtype=torch.float32) / (2 * count)))
    found, factors = rotary_keys(RotaryPart(frequencies))
    assert factors is None
    assert found == pytest.approx(base, rel=1e-5)


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_frequencies_come_back(values: list[float]) -> None:
    base, factors = rotary_keys(RotaryPart(torch.tensor(values)))
    count = len(values)
    plain = base ** (-torch.arange(count, dtype=torch.float64) / count)
    found = plain if factors is None else plain / factors.double()
    torch.testing.assert_close(found.float(), torch.tensor(values), rtol=5e-6, atol=0)
