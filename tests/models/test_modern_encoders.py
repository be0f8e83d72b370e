"""ModernBERT and the encoders of transformers 5: masked ≡ resized ≡ reloaded ≡ exported ≡ the original's own loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from exporters import ExportSettings, check_parity, dummy_inputs, export_encoder, input_names
from tests.helpers.models import (
    AUTO_CLASSES,
    HERE,
    MODERN_TYPES,
    TEXT_TASKS,
    last_states,
    output_tensors,
    random_entries,
    random_level,
    save_dense,
    tiny_batches,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import layers_of, output_linear, prunable_modules
from ziplm_deploy.models.resizing import build_replacement, masked, resize
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.reconstruction import reconstruct
from ziplm_deploy.recipe import ModelConfig, PruneConfig

pytestmark = pytest.mark.transformers

SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3}
OUTPUTS = {"sentence-similarity": ["last_hidden_state"], "question-answering": ["start_logits", "end_logits"]}


def cases() -> list[Any]:
    """ModernBERT with every head, the others with three; one that this transformers lacks as one skipped case."""
    found = []
    for model_type in MODERN_TYPES:
        if model_type not in HERE:
            reason = f"transformers {transformers.__version__} has no {model_type}"
            found.append(pytest.param(model_type, TEXT_TASKS[0], marks=pytest.mark.skip(reason=reason)))
            continue
        tasks = (
            TEXT_TASKS if model_type == "modernbert" else ("sentence-similarity", "text-classification", "fill-mask")
        )
        found += [pytest.param(model_type, task) for task in tasks]
    return found


def settings(folder: Path, task: str) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": task})


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def exported(model: nn.Module, path: Path, outputs: list[str], seq_len: int = 32, **changes: Any) -> Path:
    export = ExportSettings(seq_len=seq_len, **changes)
    export_encoder(model, dummy_inputs(model, export), outputs, path, export)
    return path


def inputs_of(model: nn.Module, batch_size: int = 2, seq_len: int = 9) -> dict[str, Tensor]:
    inputs = tiny_inputs(model, batch_size, seq_len)
    every = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    return {name: every[name] for name in input_names(model)}


@pytest.mark.parametrize(("model_type", "task"), cases())
def test_every_form_of_a_model_answers_the_same(model_type: str, task: str, tmp_path: Path) -> None:
    """For each head: the dense file as transformers itself answers, and a member in all of its forms."""
    save_dense(tmp_path / "dense", model_type, task)
    dense, tokenizer = load_dense(settings(tmp_path / "dense", task))
    inputs = inputs_of(dense, seq_len=21)
    own = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(tmp_path / "dense").eval()  # SDPA, its own choice
    real = inputs["attention_mask"].bool()

    def answers(model: nn.Module) -> dict[str, Tensor]:
        found = output_tensors(model, inputs)
        return {name: value[real] if value.shape[:2] == real.shape else value for name, value in found.items()}

    found, expected = answers(dense), answers(own)
    assert difference(found, {name: expected[name] for name in found}) < 1e-4
    outputs = OUTPUTS.get(task, ["logits"])
    assert check_parity(dense, exported(dense, tmp_path / "dense.onnx", outputs), inputs, atol=1e-4) < 1e-4
    entries = random_entries(dense, SIZES)
    member = resize(dense, entries)
    assert difference(output_tensors(masked(dense, entries), inputs), output_tensors(member, inputs)) < 1e-5
    assert difference(found, answers(member)) > 1e-3
    save_member(tmp_path / "member", member, tokenizer, settings(tmp_path / "dense", task), {})
    reloaded = load(tmp_path / "member")
    assert difference(output_tensors(reloaded, inputs), output_tensors(member, inputs)) == 0.0
    assert check_parity(member, exported(reloaded, tmp_path / "member.onnx", outputs), inputs, atol=1e-4) < 1e-4
    assert transformers.AutoConfig.from_pretrained(tmp_path / "member").model_type == model_type


@pytest.mark.parametrize("model_type", HERE)
def test_pruned_by_its_statistics_and_refitted(model_type: str) -> None:
    dense = tiny_model(model_type)
    modules, batches = prunable_modules(dense), tiny_batches(dense, n=6)
    stats = collect_statistics(dense, batches, modules, memory_limit_bytes=2**30)
    sizes = {module.name: [module.structures, module.structures // 2, 0] for module in modules}
    database = build_database(dense, stats, sizes, PruneConfig())
    pruned = resize(dense, {name: levels[sizes[name][1]] for name, levels in database.modules.items()})
    expected = last_states(dense, batches)

    def error(model: nn.Module) -> float:
        return float((last_states(model, batches) - expected).square().mean())

    before = error(pruned)
    assert before < error(resize(dense, random_entries(dense, {name: levels[1] for name, levels in sizes.items()})))
    reconstruct(dense, pruned, batches)
    assert 0 < error(pruned) < before


def test_compensation_gives_a_linear_without_a_bias_one() -> None:
    dense = tiny_model("modernbert")
    modules, batches = prunable_modules(dense), tiny_batches(dense, n=2)
    stats = collect_statistics(dense, batches, modules, memory_limit_bytes=2**30)
    database = build_database(
        dense, stats, {module.name: [module.structures // 2] for module in modules}, PruneConfig()
    )
    pruned = resize(dense, {name: next(iter(levels.values())) for name, levels in database.modules.items()})
    assert all(output_linear(dense, module).bias is None for module in modules)
    assert all(output_linear(pruned, module).bias.abs().max() > 0 for module in modules)


def test_both_halves_of_a_fused_gate_lose_the_same_columns() -> None:
    dense = tiny_model("modernbert")
    module = prunable_modules(dense)[1]
    entry = random_level(dense, module, 5)
    block = build_replacement(dense, module, entry)["mlp"]
    weight, kept = layers_of(dense)[0].mlp.Wi.weight, entry.kept  # type: ignore[union-attr]
    assert torch.equal(block.Wi.weight, torch.cat([weight[:64][kept], weight[64:][kept]]))  # type: ignore[union-attr, index]
    assert block.Wi.weight.shape == (10, 32)  # type: ignore[union-attr]


def test_heads_of_one_linear_leave_queries_keys_and_values() -> None:
    dense = tiny_model("modernbert")
    module = prunable_modules(dense)[2]
    entry = random_level(dense, module, 2)
    weight = layers_of(dense)[1].attn.Wqkv.weight.reshape(3, 4, 8, 32)  # type: ignore[union-attr, operator]
    found = build_replacement(dense, module, entry)["attn"].Wqkv.weight  # type: ignore[union-attr]
    assert torch.equal(found, weight[:, entry.kept].reshape(-1, 32))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [4, 36, 200])
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_windows_are_in_the_file_also_if_the_traced_text_is_shorter(window: int, shapes: Any, tmp_path: Path) -> None:
    """A dynamic graph is traced with 16 tokens: in a window of 18 to either side, all of them see each other; in one of
    100 those of the text do, too."""
    model = tiny_model("modernbert", local_attention=window, max_position_embeddings=64)
    path = exported(model, tmp_path / "model.onnx", ["last_hidden_state"], 60, shapes=shapes, batch_size=2)
    inputs = tiny_inputs(model, 2, 60)
    assert check_parity(model, path, inputs, atol=1e-4) < 1e-4
    everywhere = tiny_model("modernbert", local_attention=128, max_position_embeddings=64)
    changes = difference(output_tensors(model, inputs), output_tensors(everywhere, inputs))
    assert changes > 1e-3 if window < 60 else changes == 0, "a window longer than the text is none"
    if shapes == "dynamic":
        short = tiny_inputs(model, 3, 5)
        assert check_parity(model, path, short, atol=1e-4) < 1e-4


@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa", "flex_attention"])
def test_settings_of_the_attention_in_the_configuration_do_not_matter(attention: str, tmp_path: Path) -> None:
    original = save_dense(tmp_path, "modernbert", "text-classification")
    fields = json.loads((tmp_path / "config.json").read_text())
    changed = {"attn_implementation": attention, "_attn_implementation": attention, "reference_compile": True}
    (tmp_path / "config.json").write_text(json.dumps(fields | changed))
    model, _ = load_dense(settings(tmp_path, "text-classification"))
    inputs = tiny_inputs(original)
    assert difference(output_tensors(model, inputs), output_tensors(original, inputs)) == 0.0
    assert model.config._attn_implementation == "eager"


def test_padding_on_either_side_changes_no_answer() -> None:
    model = tiny_model("modernbert")
    ids = tiny_inputs(model, 1, 12)["input_ids"]
    alone = output_tensors(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["last_hidden_state"]
    for pads in ((0, 5), (5, 0)):
        padded = nn.functional.pad(ids, pads)
        mask = nn.functional.pad(torch.ones_like(ids), pads)
        found = output_tensors(model, {"input_ids": padded, "attention_mask": mask})["last_hidden_state"]
        assert (found[mask.bool()] - alone[0]).abs().max() < 1e-4  # rotary positions are relative


def test_frequencies_that_depend_on_the_text_are_refused() -> None:
    model_type = HERE[-1]
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = tiny_config(model_type)
    setattr(config, "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling", scaled)
    with pytest.raises(UnsupportedModelError, match=r"rope_type 'dynamic'.*length of the text"):
        architecture_of(config)
