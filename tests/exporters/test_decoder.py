"""Exported causal language models answer like transformers, prefill and decode; cut ones like a plain forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters import DecoderExportSettings, ParityMismatch, check_decoder_parity, export_decoder
from exporters.decoder_cache import CachedLayer, cache_arrays, cached_layers
from exporters.decoder_parts import AttentionPart, DecoderParts, FeedForwardPart, LinearPart, RotaryPart
from exporters.parity import parity_session
from tests.helpers.decoder_cuts import (
    Cut,
    dropped,
    first_queries_of_groups,
    keep_groups,
    keep_width,
    with_layers,
)
from tests.helpers.decoder_models import (
    CASES,
    HIDDEN,
    VOCABULARY,
    causal_model,
    decoder_parts,
    skip_in_old_engine,
    skip_where_windows_are_wrong,
    token_ids,
)
from tests.helpers.decoder_reference import ACTIVATIONS, reference_logits

FORMS = ("onnxruntime", "portable")
ATOL = 1e-4
MAX_LENGTH = 24
ROWS = [token_ids(1, 11, seed=1)[0].tolist(), token_ids(1, 6, seed=2)[0].tolist()]
BIAS = torch.linspace(-1, 1, HIDDEN)


def exported(parts: DecoderParts, folder: Path, form: str, **changes: Any) -> Path:
    path = folder / "model.onnx"
    export_decoder(parts, path, DecoderExportSettings(**{"max_length": MAX_LENGTH, "form": form, **changes}))
    return path


def check(logits_of: Callable[[Tensor], Tensor], path: Path, n_steps: int = 5) -> None:
    """A prompt alone, and two of different lengths."""
    check_decoder_parity(logits_of, path, ROWS[:1], ATOL, n_steps)
    check_decoder_parity(logits_of, path, ROWS, ATOL, n_steps)


def check_parts(parts: DecoderParts, path: Path) -> None:
    check(lambda ids: reference_logits(parts, ids), path)


@pytest.mark.transformers
@pytest.mark.parametrize("case", CASES)
def test_reference_is_transformers(case: str) -> None:
    model = causal_model(case)
    ids = token_ids(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(reference_logits(decoder_parts(model), ids), model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.transformers
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_file_answers_like_transformers(case: str, form: str, tmp_path: Path) -> None:
    skip_where_windows_are_wrong(case, form)
    model = causal_model(case)
    path = exported(decoder_parts(model), tmp_path, form)
    check(lambda ids: model(ids).logits, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox"])
def test_all_logits_are_those_of_every_token(case: str, form: str, tmp_path: Path) -> None:
    parts = decoder_parts(causal_model(case))
    path = exported(parts, tmp_path, form, all_logits=True)
    check_parts(parts, path)
    feed = {"input_ids": token_ids(2, 9).numpy(), "attention_mask": np.ones((2, 9), np.int64)}
    if form == "portable":
        feed["position_ids"] = np.arange(9)[None].repeat(2, axis=0)
    logits, *_ = parity_session(path).run(["logits"], feed | cache_arrays(parts, 2))
    np.testing.assert_allclose(logits, reference_logits(parts, token_ids(2, 9)).numpy(), atol=ATOL)


CUTS: dict[str, dict[int, Cut]] = {
    "heads": {0: keep_groups(1), 2: keep_groups(0)},
    "widths": {0: keep_width(5), 1: keep_width(33), 2: keep_width(1)},
    "queries": {1: first_queries_of_groups},
    "first attention": {0: dropped("attention")},
    "middle attention": {1: dropped("attention")},
    "last attention": {2: dropped("attention")},
    "first feed-forward": {0: dropped("feed_forward")},
    "last feed-forward": {2: dropped("feed_forward")},
    "attention with bias": {0: dropped("attention", bias=BIAS), 2: dropped("attention", bias=-BIAS)},
    "feed-forward with bias": {1: dropped("feed_forward", bias=BIAS), 2: dropped("feed_forward", bias=-BIAS)},
    "layer": {1: dropped("attention", "feed_forward")},
    "layers with bias": {
        0: dropped("attention", "feed_forward", bias=BIAS),
        1: dropped("attention", "feed_forward", bias=BIAS),
        2: keep_groups(0),
    },
    "all": dict.fromkeys(range(3), dropped("attention", "feed_forward")),
    "all with bias": dict.fromkeys(range(3), dropped("attention", "feed_forward", bias=BIAS)),
    "all attention": dict.fromkeys(range(3), dropped("attention")),
}
CUT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 2}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CUT_MODELS)
def test_cut_models_answer_like_their_parts(name: str, cut: str, form: str, tmp_path: Path) -> None:
    case, changes = CUT_MODELS[name]
    parts = with_layers(decoder_parts(causal_model(case, **changes)), CUTS[cut])
    check_parts(parts, exported(parts, tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_model_without_layers(case: str, form: str, tmp_path: Path) -> None:
    parts = dataclasses.replace(decoder_parts(causal_model(case)), layers=())
    path = exported(parts, tmp_path, form)
    assert [item.name for item in parity_session(path).get_outputs()] == ["logits"]
    check_parts(parts, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: Any, gated: bool, form: str, tmp_path: Path) -> None:
    def changed(layer: Any) -> Any:
        gate = layer.feed_forward.gate if gated else None
        part = dataclasses.replace(layer.feed_forward, activation=activation, gate=gate)
        return dataclasses.replace(layer, feed_forward=part)

    parts = with_layers(decoder_parts(causal_model("llama")), dict.fromkeys(range(3), changed))
    check_parts(parts, exported(parts, tmp_path, form))


def with_attention(parts: DecoderParts, **changes: Any) -> DecoderParts:
    def changed(layer: Any) -> Any:
        return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **changes))

    return with_layers(parts, dict.fromkeys(range(len(parts.layers)), changed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, 2, 7, MAX_LENGTH])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_windows_and_scales(case: str, window: int, form: str, tmp_path: Path) -> None:
    skip_in_old_engine(form, (1, 24))
    parts = with_attention(decoder_parts(causal_model(case)), window=window, scale=0.7)
    check_parts(parts, exported(parts, tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_frequencies", [1, 5, 8])
def test_some_turned_dimensions(n_frequencies: int, form: str, tmp_path: Path) -> None:
    frequencies = torch.linspace(1.0, 0.1, n_frequencies)
    parts = decoder_parts(causal_model("qwen3"))
    parts = with_attention(parts, query_norm=None, key_norm=None)
    parts = dataclasses.replace(parts, rotary=RotaryPart(frequencies, scale=1.25))
    check_parts(parts, exported(parts, tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
def test_biases_of_some_linears(form: str, tmp_path: Path) -> None:
    """What compensation adds: a bias to a linear that had none, here to keys, outputs and down projections."""

    def biased(part: LinearPart, scale: float) -> LinearPart:
        return LinearPart(part.weight, torch.linspace(-scale, scale, len(part.weight)))

    def changed(layer: Any) -> Any:
        attention, feed_forward = layer.attention, layer.feed_forward
        attention = dataclasses.replace(attention, key=biased(attention.key, 0.5), output=biased(attention.output, 1))
        feed_forward = dataclasses.replace(feed_forward, down=biased(feed_forward.down, -1))
        return dataclasses.replace(layer, attention=attention, feed_forward=feed_forward)

    parts = with_layers(decoder_parts(causal_model("llama")), {0: changed, 2: changed})
    parts = dataclasses.replace(parts, head=biased(LinearPart(parts.embedding), 1))
    check_parts(parts, exported(parts, tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama", "llama-narrow", "gpt2"])
def test_a_text_may_be_as_long_as_the_tables(case: str, form: str, tmp_path: Path) -> None:
    parts = decoder_parts(causal_model(case))
    path = exported(parts, tmp_path, form, max_length=len(ROWS[0]) + 3)
    check_decoder_parity(lambda ids: reference_logits(parts, ids), path, ROWS[:1], ATOL, n_steps=3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_parallel_blocks_read_the_same_stream(case: str, form: str, tmp_path: Path) -> None:
    parts = decoder_parts(causal_model(case))
    cuts: dict[int, Cut] = {0: dropped("attention", bias=BIAS), 2: dropped("feed_forward", bias=BIAS)}
    parallel = tuple(dataclasses.replace(layer, parallel=True) for layer in parts.layers)
    for layers in (parallel, with_layers(dataclasses.replace(parts, layers=parallel), cuts).layers):
        changed = dataclasses.replace(parts, layers=layers)
        check_parts(changed, exported(changed, tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
def test_layer_norm_without_bias(form: str, tmp_path: Path) -> None:
    parts = decoder_parts(causal_model("gpt2"))
    parts = dataclasses.replace(parts, final_norm=dataclasses.replace(parts.final_norm, bias=None))
    check_parts(parts, exported(parts, tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama", "llama-narrow", "gpt2"])
def test_a_prompt_may_come_in_two_calls(case: str, form: str, tmp_path: Path) -> None:
    skip_in_old_engine(form, (1, 20))
    parts = decoder_parts(causal_model(case))
    session = parity_session(exported(parts, tmp_path, form))
    ids, cache = token_ids(1, 10), cache_arrays(parts, 1)
    for start, end in ((0, 6), (6, 10)):
        feed = {"input_ids": ids[:, start:end].numpy(), "attention_mask": np.ones((1, end), np.int64)}
        if form == "portable":
            feed["position_ids"] = np.arange(start, end)[None]
        logits, *present = session.run(None, feed | cache)
        cache = dict(zip(cache, present, strict=True))
    np.testing.assert_allclose(logits[:, -1], reference_logits(parts, ids)[:, -1].numpy(), atol=ATOL)


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral", "gpt_neox-serial"])
def test_portable_form_takes_padding_on_the_left(case: str, tmp_path: Path) -> None:
    parts = decoder_parts(causal_model(case))
    session = parity_session(exported(parts, tmp_path, "portable"))
    lengths = [11, 6]
    mask = np.array([[0] * (11 - length) + [1] * length for length in lengths])
    ids = np.array([[0] * (11 - len(row)) + row for row in ROWS])
    rows, cache = [list(row) for row in ROWS], cache_arrays(parts, 2)
    for _ in range(5):
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *present = session.run(None, feed | cache)
        cache = dict(zip(cache, present, strict=True))
        for row, found in zip(rows, logits, strict=True):
            expected = reference_logits(parts, torch.tensor([row]))[0, -1:].numpy()
            np.testing.assert_allclose(found, expected, atol=ATOL)
            row.append(int(expected.argmax()))
        ids = np.array([[row[-1]] for row in rows])
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    parts = decoder_parts(causal_model("qwen2").to(torch.bfloat16))
    model = causal_model("qwen2").to(torch.bfloat16).float()
    assert parts.embedding.dtype == torch.bfloat16
    path = exported(parts, tmp_path, "onnxruntime")
    rotary = dataclasses.replace(decoder_parts(model), rotary=parts.rotary)
    check_parts(rotary, path)


def test_cache_is_told_layer_by_layer() -> None:
    cuts = {0: dropped("attention"), 2: keep_groups(1)}
    parts = with_layers(decoder_parts(causal_model("qwen3")), cuts)
    assert cached_layers(parts) == (CachedLayer(1, 2, 16), CachedLayer(2, 1, 16))
    arrays = cache_arrays(parts, batch_size=3, tokens=7)
    assert {name: array.shape for name, array in arrays.items()} == {
        "past_key_values.1.key": (3, 2, 7, 16),
        "past_key_values.1.value": (3, 2, 7, 16),
        "past_key_values.2.key": (3, 1, 7, 16),
        "past_key_values.2.value": (3, 1, 7, 16),
    }
    assert cached_layers(dataclasses.replace(parts, layers=())) == ()


def test_parity_notices_another_model(tmp_path: Path) -> None:
    parts = decoder_parts(causal_model("llama"))
    path = exported(parts, tmp_path, "onnxruntime")
    other = with_attention(parts, scale=0.1)
    with pytest.raises(ParityMismatch, match="row 0 at token 11, prefill") as caught:
        check_decoder_parity(lambda ids: reference_logits(other, ids), path, ROWS, ATOL)
    assert caught.value.difference > ATOL


def test_parity_notices_a_cache_that_goes_wrong(tmp_path: Path) -> None:
    """A window of the prompt's length changes nothing in the prefill, and every step after it."""
    skip_in_old_engine("onnxruntime", (1, 24))
    parts = decoder_parts(causal_model("llama"))
    path = exported(with_attention(parts, window=11), tmp_path, "onnxruntime")
    with pytest.raises(ParityMismatch, match="decode step 1"):
        check_decoder_parity(lambda ids: reference_logits(parts, ids), path, ROWS[:1], ATOL)


def test_parity_notices_another_vocabulary(tmp_path: Path) -> None:
    parts = decoder_parts(causal_model("llama"))
    path = exported(parts, tmp_path, "onnxruntime")
    with pytest.raises(ParityMismatch, match="of shape"):
        check_decoder_parity(lambda ids: reference_logits(parts, ids)[..., : VOCABULARY - 1], path, ROWS, ATOL)


def test_helpers_cut_what_they_say() -> None:
    parts = with_layers(decoder_parts(causal_model("llama")), {0: keep_groups(1), 1: keep_width(5)})
    attention, feed_forward = parts.layers[0].attention, parts.layers[1].feed_forward
    assert isinstance(attention, AttentionPart)
    assert isinstance(feed_forward, FeedForwardPart)
    assert (attention.n_heads, attention.n_kv_heads, len(feed_forward.up.weight)) == (2, 1, 5)
