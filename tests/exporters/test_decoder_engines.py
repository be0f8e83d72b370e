"""Stock engines take exported causal language models as they are, with layers that differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters import DecoderExportSettings, ExportError, SpecialTokens, export_decoder, write_genai_config
from exporters.decoder_cache import cache_arrays
from exporters.decoder_parts import DecoderParts
from tests.helpers.decoder_cuts import dropped, keep_groups, keep_width, with_layers
from tests.helpers.decoder_models import (
    HIDDEN,
    VOCABULARY,
    causal_model,
    decoder_parts,
    skip_where_windows_are_wrong,
    token_ids,
)
from tests.helpers.decoder_reference import greedy, reference_logits

CASES = ("llama", "qwen3", "mistral", "gpt2", "opt", "gpt_neox")
MAX_LENGTH = 24
N_TOKENS = 12
TOKENS = SpecialTokens(end=[2], begin=1, pad=0)
BIAS = torch.linspace(-1, 1, HIDDEN)


def uneven(case: str) -> tuple[Any, DecoderParts]:
    """A model, and its parts with other heads and widths in each layer and no attention in the last."""
    model = causal_model(case, **({"num_attention_heads": 2} if case == "gpt_neox" else {}))
    cuts = {0: keep_width(40), 1: keep_groups(0), 2: dropped("attention", bias=BIAS)}
    return model, with_layers(decoder_parts(model), cuts)


def prompt_without_end(parts: DecoderParts) -> tuple[torch.Tensor, list[int]]:
    """A prompt whose greedy answer ends only with its length, and both together."""
    for seed in range(50):
        ids = token_ids(1, 7, seed)
        answer = greedy(parts, ids, N_TOKENS)
        if not {0, 1, 2} & set(answer):
            return ids, answer
    raise AssertionError("every answer has a special token")


@pytest.mark.parametrize("form", ["onnxruntime", "portable"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("default")
def test_stock_optimum_generates_the_same(case: str, form: Any, tmp_path: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    skip_where_windows_are_wrong(case, form)
    model, parts = uneven(case)
    settings = DecoderExportSettings(MAX_LENGTH, form=form, stock_optimum=True, max_file_bytes=0)
    export_decoder(parts, tmp_path / "model.onnx", settings)
    if form == "onnxruntime":
        write_genai_config(tmp_path / "model.onnx", TOKENS)  # the graph beside is not taken for the model
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    ids, expected = prompt_without_end(parts)
    loaded = optimum.ORTModelForCausalLM.from_pretrained(tmp_path)
    found = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_TOKENS, do_sample=False)
    assert found[0].tolist() == expected


def generated_by_genai(folder: Path, ids: torch.Tensor, share: bool) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(folder))
    search = genai.GeneratorParams(model)
    search.set_search_options(max_length=ids.shape[1] + N_TOKENS, past_present_share_buffer=share)
    generator = genai.Generator(model, search)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_genai_generates_the_same(case: str, share: bool, tmp_path: Path) -> None:
    _, parts = uneven(case)
    export_decoder(parts, tmp_path / "model.onnx", DecoderExportSettings(MAX_LENGTH))
    write_genai_config(tmp_path / "model.onnx", TOKENS)
    ids, expected = prompt_without_end(parts)
    assert generated_by_genai(tmp_path, ids, share) == expected


@pytest.mark.parametrize("case", CASES)
def test_genai_and_optimum_share_a_folder(case: str, tmp_path: Path) -> None:
    _, parts = uneven(case)
    path = tmp_path / "model.onnx"
    export_decoder(parts, path, DecoderExportSettings(MAX_LENGTH, stock_optimum=True, max_file_bytes=0))
    write_genai_config(path, TOKENS)
    graph = onnx.load(tmp_path / "model.genai.onnx").graph  # with the weights that it refers to
    shapes = {item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in graph.input}
    for name, array in cache_arrays(parts, 1).items():
        assert shapes[name] == [0, array.shape[1], 0, array.shape[3]]
    ids, expected = prompt_without_end(parts)
    assert generated_by_genai(tmp_path, ids, share=True) == expected


def test_genai_config_says_what_the_file_says(tmp_path: Path) -> None:
    _, parts = uneven("llama")
    export_decoder(parts, tmp_path / "model.onnx", DecoderExportSettings(MAX_LENGTH))
    path = write_genai_config(tmp_path / "model.onnx", SpecialTokens(end=[2, 5]))
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    assert (model["context_length"], model["vocab_size"]) == (MAX_LENGTH, VOCABULARY)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (2, [2, 5], 2)
    decoder = model["decoder"]
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [decoder[name] for name in sizes] == [8, HIDDEN, 4, 2, 2]  # the last layer has no cache
    assert decoder["filename"] == "model.onnx"


def test_genai_config_needs_no_second_graph_where_layers_are_alike(tmp_path: Path) -> None:
    parts = decoder_parts(causal_model("llama"))
    export_decoder(parts, tmp_path / "model.onnx", DecoderExportSettings(MAX_LENGTH, stock_optimum=True))
    write_genai_config(tmp_path / "model.onnx", TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genai_config.json", "model.onnx"]


@pytest.mark.parametrize(
    ("settings", "tokens", "message"),
    [
        ({"form": "portable"}, TOKENS, "found no GroupQueryAttention"),
        ({"stock_optimum": True}, TOKENS, "max_file_bytes = 0, or without stock_optimum"),
        ({}, SpecialTokens(end=[]), "at least one token that ends a text"),
    ],
)
def test_bad_input_of_genai_config(
    settings: dict[str, Any], tokens: SpecialTokens, message: str, tmp_path: Path
) -> None:
    _, parts = uneven("llama")
    export_decoder(parts, tmp_path / "model.onnx", DecoderExportSettings(MAX_LENGTH, **settings))
    with pytest.raises(ExportError, match=message):
        write_genai_config(tmp_path / "model.onnx", tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_genai_config_without_attention(tmp_path: Path) -> None:
    parts = dataclasses.replace(decoder_parts(causal_model("llama")), layers=())
    export_decoder(parts, tmp_path / "model.onnx", DecoderExportSettings(MAX_LENGTH))
    with pytest.raises(ExportError, match="with attention in a layer"):
        write_genai_config(tmp_path / "model.onnx", TOKENS)


@pytest.mark.parametrize("case", [*CASES, "gpt_neox-serial", "qwen2"])
@pytest.mark.filterwarnings("default")
def test_openvino_runs_the_portable_form(case: str, tmp_path: Path) -> None:
    """Prefill and decode of a batch whose second row is shorter."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    _, parts = uneven(case)
    export_decoder(parts, tmp_path / "model.onnx", DecoderExportSettings(MAX_LENGTH, form="portable"))
    core = openvino.Core()
    compiled = core.compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    rows = [token_ids(1, 8, seed=1)[0].tolist(), token_ids(1, 5, seed=2)[0].tolist()]
    mask = np.array([[1] * 8, [1] * 5 + [0] * 3])
    ids, cache = np.array([rows[0], rows[1] + [0] * 3]), cache_arrays(parts, 2)
    for _ in range(5):
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        found = compiled({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache})
        cache = {name: np.array(found[name.replace("past_key_values", "present")]) for name in cache}
        for row, logits in zip(rows, found["logits"], strict=True):
            expected = reference_logits(parts, torch.tensor([row]))[0, -1:].numpy()
            np.testing.assert_allclose(logits, expected, atol=1e-3)
            row.append(int(expected.argmax()))
        ids = np.array([[row[-1]] for row in rows])
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
