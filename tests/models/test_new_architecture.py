"""One entry is all that a further architecture needs: for pruning, saving, exporting and quantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import ExportSettings, check_parity, dummy_inputs, export_encoder
from tests.helpers.int8_files import settings_of
from tests.helpers.models import (
    output_tensors,
    random_entries,
    tiny_batches,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)
from ziplm_deploy.compression.int8.fake_quant import quantizable_linears
from ziplm_deploy.compression.int8.quantize import linear_names, quantize, quantized_linears
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import ARCHITECTURES, Architecture, architecture_of
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.models.resizing import masked, resize
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.reconstruction import reconstruct
from ziplm_deploy.recipe import Int8Config, ModelConfig, PruneConfig

# What an entry says: nothing, for a model with BERT's names; where the norms are, for one that normalizes before.
LIKE_BERT = Architecture("rembert")
NORMALIZED_BEFORE = Architecture("megatron-bert", ffn_residual="ln", attention_norm="attention.ln", ffn_norm="ln")
CHANGES: dict[str, dict[str, Any]] = {
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "megatron-bert": {},
}
SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3}


@pytest.fixture(params=[LIKE_BERT, NORMALIZED_BEFORE], ids=lambda entry: entry.model_type)
def model_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The type of a model that an entry was added for."""
    entry: Architecture = request.param
    with pytest.raises(UnsupportedModelError, match=entry.model_type):
        architecture_of(tiny_config(entry.model_type))
    monkeypatch.setitem(ARCHITECTURES, entry.model_type, entry)
    return entry.model_type


def model_of(model_type: str) -> torch.nn.Module:
    return tiny_model(model_type, "text-classification", **CHANGES[model_type])


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_masked_equals_resized_equals_reloaded_equals_exported(model_type: str, tmp_path: Path) -> None:
    dense = model_of(model_type)
    inputs, entries = tiny_inputs(dense), random_entries(dense, SIZES)
    resized = resize(dense, entries)
    expected = output_tensors(masked(dense, entries), inputs)
    assert difference(expected, output_tensors(resized, inputs)) < 1e-5
    assert difference(expected, output_tensors(dense, inputs)) > 1e-3
    config = ModelConfig.model_validate({"path": str(tmp_path), "task": "text-classification"})
    save_member(tmp_path / "member", resized, tiny_tokenizer(tmp_path), config, {})
    assert difference(output_tensors(load(tmp_path / "member"), inputs), output_tensors(resized, inputs)) == 0.0
    settings = ExportSettings(seq_len=16)
    example = dummy_inputs(resized, settings)
    export_encoder(resized, example, ["logits"], tmp_path / "model.onnx", settings)
    assert check_parity(resized, tmp_path / "model.onnx", example, atol=1e-4) < 1e-4


def test_pruned_by_its_statistics_and_refitted(model_type: str) -> None:
    dense = model_of(model_type)
    modules, batches = prunable_modules(dense), tiny_batches(dense)
    stats = collect_statistics(dense, batches, modules, memory_limit_bytes=2**30)
    sizes = {module.name: [module.structures, module.structures // 2, 0] for module in modules}
    database = build_database(dense, stats, sizes, PruneConfig())
    pruned = resize(dense, {name: levels[sizes[name][1]] for name, levels in database.modules.items()})
    expected = output_tensors(dense, batches[0])
    before = difference(output_tensors(pruned, batches[0]), expected)
    reconstruct(dense, pruned, batches)
    assert 0 < difference(output_tensors(pruned, batches[0]), expected) < before
    noise = resize(dense, random_entries(dense, {name: levels[1] for name, levels in sizes.items()}))
    assert before < difference(output_tensors(noise, batches[0]), expected)


def test_all_linears_of_its_layers_become_int8(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    settings = ExportSettings(shapes="static", opset=16, batch_size=2, seq_len=9)
    inputs = dummy_inputs(model, settings)
    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    export_encoder(model, inputs, ["logits"], source, settings)
    assert set(linear_names(source)) == set(quantizable_linears(model))
    assert len(linear_names(source)) == 18
    batch = {name: value.numpy() for name, value in inputs.items()}
    quantize(source, target, settings_of(Int8Config(method="static")), batches=[batch])
    assert quantized_linears(target) == linear_names(source)
    assert 1e-4 < check_parity(model, target, inputs, atol=1.0) < 0.3
