"""INT8 files of causal language models: which linears, the head's own matrix, and answers near those in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters import DecoderExportSettings, export_decoder
from exporters.names import HEAD
from tests.helpers.decoder_models import CASES, causal_model, decoder_parts
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.fake_quant import quantizable_linears
from ziplm_deploy.compression.int8.quantize import linear_names, quantize, quantized_linears
from ziplm_deploy.compression.int8.sensitivity import rank_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.recipe import Int8Config

SETTINGS = Int8Settings(Int8Config(), "onnxruntime", reduce_range=True)
KINDS = ["llama", "qwen3", "gpt2", "gpt_neox", "opt"]


def exported(case: str, folder: Path, **changes: Any) -> tuple[Any, Path]:
    """A model with plain linears, and its file."""
    model = causal_model(case, **changes)
    path = folder / "model.onnx"
    export_decoder(decoder_parts(model), path, DecoderExportSettings(max_length=24))
    return as_linears(copy.deepcopy(model)), path


@pytest.mark.parametrize("case", KINDS)
def test_linears_of_a_file_stand_for_all_of_the_model(case: str, tmp_path: Path) -> None:
    model, path = exported(case, tmp_path)
    names = linear_names(path)
    groups = linear_groups(model, names)
    assert tuple(groups) == names
    assert {module for modules in groups.values() for module in modules} == set(quantizable_linears(model))
    separate = {"layers.0.attention.query", "layers.0.attention.key", "layers.0.attention.value"}
    assert separate <= set(names) or "layers.0.attention.qkv" in names
    assert case != "qwen3" or separate <= set(names)  # norms stand between
    assert case != "gpt2" or "layers.0.attention.qkv" in names
    assert names[-1] == HEAD


@pytest.mark.parametrize("case", KINDS)
def test_files_answer_like_float32_ones_as_far_as_eight_bits_can(case: str, tmp_path: Path) -> None:
    _, path = exported(case, tmp_path)
    target = tmp_path / "model_int8.onnx"
    quantize(path, target, SETTINGS)
    assert set(quantized_linears(target)) == set(linear_names(path))
    batch = {"input_ids": np.arange(1, 13).reshape(1, 12), "attention_mask": np.ones((1, 12), np.int64)}
    expected, found = (onnx_runner(each)(batch)["logits"] for each in (path, target))
    assert found.shape == expected.shape == (1, 12, 61)
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_integers_has_a_matrix_of_its_own(tied: bool, tmp_path: Path) -> None:
    _, path = exported("llama", tmp_path, vocab_size=5000, tie_word_embeddings=tied, hidden_size=96)
    both, kept = tmp_path / "both.onnx", tmp_path / "kept.onnx"
    quantize(path, both, SETTINGS)
    quantize(path, kept, SETTINGS, keep_fp32=[HEAD])
    floats = {}
    for name in (both, kept):
        tensors = onnx.load(name).graph.initializer
        floats[name.stem] = {item.name for item in tensors if item.data_type == 1 and 5000 in item.dims}
    assert not {name for name in floats["both"] if "scale" not in name}
    # A tied head in float32 reads the embedding, which must then stay as it is: the file has it once.
    assert floats["kept"] == ({"embedding.weight"} if tied else {"head.weight_Transposed"})
    assert path.stat().st_size > 2 * both.stat().st_size


def test_linears_are_ranked_by_the_names_of_the_file(tmp_path: Path) -> None:
    model, path = exported("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] /= 3000
        model.model.layers[1].mlp.up_proj.weight[5] *= 3000  # the same function, through one massive activation
    batches = [{"input_ids": torch.arange(1, 25).reshape(2, 12), "attention_mask": torch.ones(2, 12).long()}]
    expected = model(**batches[0]).logits.detach()

    @torch.no_grad()
    def divergence(candidate: torch.nn.Module, changed: Sequence[str] = ()) -> float:
        return float((candidate(**batches[0]).logits - expected).square().mean())

    groups = linear_groups(model, linear_names(path))
    rows = rank_linears(model, batches, divergence, SETTINGS, groups=groups)
    assert {row.name for row in rows} == set(groups)
    assert rows[0].name == "layers.1.feed_forward.down"
    assert divergence(model) == 0.0


def test_every_kind_is_one_of_the_cases() -> None:
    assert set(KINDS) <= CASES.keys()
