"""What only some image models have: layer scales, positions that fit any image, a second head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from exporters import ExportSettings, check_parity, dummy_inputs, export_encoder
from tests.helpers.models import (
    output_tensors,
    plain_model,
    random_entries,
    save_dense,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from tests.helpers.onnx_models import kernels_of
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import why_not
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.layer_scale import fold_layer_scales
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import output_linear, prunable_modules
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers
SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3}


def settings(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), task="image-classification")


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_layer_scales_are_folded_into_what_they_scale() -> None:
    plain, folded = plain_model("dinov2"), tiny_model("dinov2")
    inputs = tiny_inputs(plain)
    assert difference(output_tensors(plain, inputs), output_tensors(folded, inputs)) < 1e-5
    before, after = (output_linear(model, prunable_modules(model)[3]) for model in (plain, folded))
    scale = plain.get_submodule("dinov2.encoder.layer.1.layer_scale2").lambda1
    torch.testing.assert_close(after.weight, before.weight * scale[:, None])
    torch.testing.assert_close(after.bias, before.bias * scale)
    again = fold_layer_scales(folded)
    assert torch.equal(output_linear(again, prunable_modules(again)[3]).weight, after.weight)


def test_a_folded_model_is_saved_as_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    folded = tiny_model("dinov2")
    folded.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = tiny_inputs(folded)
    assert difference(output_tensors(loaded.eval(), inputs), output_tensors(folded, inputs)) == 0.0


def processor(folder: Path, size: dict[str, int]) -> None:
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)


def test_positions_settle_at_the_size_of_the_images(tmp_path: Path) -> None:
    """DINOv2 is trained on large images and served small ones."""
    save_dense(tmp_path, "dinov2", "image-classification", image_size=32)
    processor(tmp_path, {"height": 16, "width": 16})
    dense, images = load_dense(settings(tmp_path))
    assert dense.config.image_size == 16  # type: ignore[union-attr]
    original = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    expected = output_tensors(original.eval(), inputs)
    assert difference(output_tensors(dense, inputs), expected) < 1e-5
    member = resize(dense, random_entries(dense, SIZES))
    save_member(tmp_path / "member", member, images, settings(tmp_path), {})
    outputs = output_tensors(member, inputs)
    assert difference(output_tensors(load(tmp_path / "member"), inputs), outputs) == 0.0
    export = ExportSettings()
    export_encoder(member, dummy_inputs(member, export), ["logits"], tmp_path / "model.onnx", export)
    assert check_parity(member, tmp_path / "model.onnx", inputs, atol=1e-4) < 1e-4


def test_images_of_another_form_are_refused(tmp_path: Path) -> None:
    save_dense(tmp_path, "dinov2", "image-classification")
    processor(tmp_path, {"height": 16, "width": 24})
    with pytest.raises(UnsupportedModelError, match="found 3 x 16 x 24"):
        load_dense(settings(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"use_swiglu_ffn": True}, "use_swiglu_ffn True"), ({"drop_path_rate": 0.1}, r"drop_path_rate 0\.1: set it to 0")],
)
def test_other_kinds_of_dinov2_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        assert why_not(tiny_config("dinov2", **changes)) is None


def test_a_distilled_deit_keeps_both_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config("deit", num_labels=3, architectures=["DeiTForImageClassificationWithTeacher"])
    original: Any = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    original.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(original).__name__]
    processor(tmp_path, {"height": 16, "width": 16})
    dense, images = load_dense(settings(tmp_path))
    inputs = tiny_inputs(dense)
    expected = output_tensors(original, inputs)
    assert set(expected) == {"logits", "cls_logits", "distillation_logits"}
    assert difference(output_tensors(dense, inputs), expected) == 0.0
    member = resize(dense, random_entries(dense, SIZES))
    save_member(tmp_path / "member", member, images, settings(tmp_path), {})
    assert difference(output_tensors(load(tmp_path / "member"), inputs), output_tensors(member, inputs)) == 0.0


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_a_graph_interpolates_no_positions(shapes: Any, tmp_path: Path) -> None:
    """transformers has every traced graph do so."""
    model, export = tiny_model("dinov2"), ExportSettings(shapes=shapes)
    export_encoder(model, dummy_inputs(model, export), ["logits"], tmp_path / "model.onnx", export)
    assert kernels_of(tmp_path / "model.onnx")["Resize"] == 0
