"""Zeros held in training, made at random for timing, and found again in ONNX files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exporters import ExportSettings, dummy_inputs, export_encoder
from tests.helpers.int8_files import settings_of
from tests.helpers.models import random_entries, tiny_batches, tiny_inputs, tiny_model
from tests.helpers.onnx_models import write
from ziplm_deploy.compression.int8.quantize import quantize
from ziplm_deploy.compression.sparsity.masks import check_masks_in_onnx, random_masks, zero_masks, zeros_held
from ziplm_deploy.errors import CorruptArtifactError, NumericalError, ParityError, UsageError
from ziplm_deploy.models.modules import layer_linears
from ziplm_deploy.models.resizing import random_resized, resize
from ziplm_deploy.recipe import EngineName, Int8Config, SparsityConfig

SIZES = {"0.attention": 2, "0.ffn": 24, "1.attention": 0, "1.ffn": 13, "2.ffn": 0}
QUERY = "encoder.layer.0.attention.self.query"


def export(model: nn.Module, path: Path, opset: int = 17) -> Path:
    settings = ExportSettings(seq_len=16, opset=opset)
    output = "logits" if model.config.model_type == "vit" else "last_hidden_state"  # type: ignore[union-attr]
    export_encoder(model, dummy_inputs(model, settings), [output], path, settings)
    return path


# --- zeros in training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_in_training(optimizer: type[torch.optim.Optimizer], bf16: bool) -> None:
    model = tiny_model("distilbert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    masks, start = zero_masks(model), copy.deepcopy(model.state_dict())
    data = tiny_batches(model, 3)
    with zeros_held(model, masks):
        steps = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)  # type: ignore[call-arg]
        for batch in data:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(**batch).last_hidden_state.float().sin().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            steps.zero_grad()
    for name, linear in layer_linears(model).items():
        assert torch.equal(linear.weight == 0, masks[name])
        assert not torch.equal(linear.weight, start[f"{name}.weight"])
        assert not linear.weight._backward_hooks


def test_frozen_linears_are_held_as_they_are() -> None:
    model = tiny_model("bert").requires_grad_(False)
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    with zeros_held(model, zero_masks(model)):
        assert not layer_linears(model)[QUERY].weight._backward_hooks


def test_momentum_from_before_is_noticed() -> None:
    model = tiny_model("bert")
    steps = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step() -> None:
        steps.zero_grad()
        model(**tiny_inputs(model)).last_hidden_state.sin().sum().backward()
        steps.step()

    step()
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    with pytest.raises(NumericalError, match="optimizer"), zeros_held(model, zero_masks(model)):
        step()


def test_masks_of_another_model_are_refused() -> None:
    model = tiny_model("bert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    masks = zero_masks(model)
    with pytest.raises(UsageError, match="wherever its mask"), zeros_held(tiny_model("bert"), masks):
        pass
    with (
        pytest.raises(UsageError, match="as in the mask"),
        zeros_held(random_resized(model, {"0.attention": 2}), masks),
    ):
        pass
    with pytest.raises(UsageError, match="no such linear"), zeros_held(tiny_model("distilbert"), masks):
        pass
    assert not layer_linears(model)[QUERY].weight._backward_hooks


def test_hooks_go_when_training_fails() -> None:
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="disk"), zeros_held(model, zero_masks(model)):
        raise RuntimeError("disk")
    assert not layer_linears(model)[QUERY].weight._backward_hooks


# --- random zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_random_zeros_have_sparsity_and_pattern(pattern: str) -> None:
    models = [random_resized(tiny_model("bert"), {"0.ffn": 13, "1.attention": 0}) for _ in range(3)]
    config = SparsityConfig.model_validate({"sparsity": 0.8, "pattern": pattern})
    for model, seed in zip(models, (0, 0, 1), strict=True):
        random_masks(model, config, seed)
    masks = [zero_masks(model) for model in models]
    for name, mask in masks[0].items():
        assert float(mask.double().mean()) == pytest.approx(0.8, abs=0.03)
        assert torch.equal(mask, masks[1][name])
        assert not torch.equal(mask, masks[2][name])
        if pattern == "block4":
            assert all(torch.equal(group.any(1), group.all(1)) for group in mask.split(4, dim=1))
        else:
            assert int(mask.sum()) == round(0.8 * mask.numel())


# --- zeros in files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "task"),
    [(name, task) for name in ("bert", "distilbert", "mpnet") for task in (None, "text-classification")]
    + [("vit", None)],
)
def test_exported_zeros_are_found(model_type: str, task: str | None, tmp_path: Path) -> None:
    model = tiny_model(model_type, task)
    model = resize(model, random_entries(model, SIZES))
    random_masks(model, SparsityConfig(sparsity=0.7), 0)
    settings = ExportSettings(seq_len=16)
    output = "logits" if task or model_type == "vit" else "last_hidden_state"
    export_encoder(model, dummy_inputs(model, settings), [output], tmp_path / "model.onnx", settings)
    check_masks_in_onnx(tmp_path / "model.onnx", model)


def test_other_zeros_name_the_linear(tmp_path: Path) -> None:
    model = tiny_model("bert")
    random_masks(model, SparsityConfig(sparsity=0.5), 0)
    path = export(model, tmp_path / "model.onnx")
    name = "encoder.layer.1.output.dense"
    linear = layer_linears(model)[name]
    place = tuple(linear.weight.detach().nonzero()[0].tolist())
    value = linear.weight[place].item()
    with torch.no_grad():
        linear.weight[place] = 0  # the file has a weight that the model has not
    with pytest.raises(ParityError, match=r"encoder\.layer\.1\.output\.dense.*1 of them lost and 0"):
        check_masks_in_onnx(path, model)
    with torch.no_grad():
        linear.weight[place] = value
        linear.weight[tuple((linear.weight == 0).nonzero()[0].tolist())] = 1.0  # and the other way round
    with pytest.raises(ParityError, match=r"encoder\.layer\.1\.output\.dense.*0 of them lost and 1"):
        check_masks_in_onnx(path, model)


def test_other_models_and_files_are_errors(tmp_path: Path) -> None:
    model = tiny_model("bert")
    path = export(random_resized(model, {"1.attention": 0}), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"encoder\.layer\.1\.attention\.self\.query .*no such node"):
        check_masks_in_onnx(path, model)
    path = export(random_resized(model, {"0.ffn": 8}), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"intermediate\.dense with \[32, 64\] weights.*\[32, 8\]"):
        check_masks_in_onnx(path, model)
    with pytest.raises(CorruptArtifactError, match="missing"):
        check_masks_in_onnx(tmp_path / "missing.onnx", model)
    (tmp_path / "broken.onnx").write_bytes(b"\x0a\xff\xffno model")
    with pytest.raises(CorruptArtifactError, match="broken"):
        check_masks_in_onnx(tmp_path / "broken.onnx", model)


def quantized(path: Path, target: Path, form: str, *, asymmetric: bool = False) -> Path:
    """The file with integer weights: behind DequantizeLinear (`qdq`), or in MatMulInteger (`integer`)."""
    model = onnx.load(path)
    graph = model.graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays]:
        weight = numpy_helper.to_array(arrays[node.input[1]])
        scale = np.abs(weight).max(0).astype(np.float32) / 100  # one for each output
        zero_point = np.arange(weight.shape[1]).astype(np.uint8) + 100 if asymmetric else np.zeros(len(scale), np.int8)
        integers = (np.round(weight / scale) + zero_point).astype(zero_point.dtype)
        name = node.input[1]
        for suffix, array in (("q", integers), ("scale", scale), ("zero", zero_point)):
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{name}_{suffix}"))
        if form == "qdq":
            inputs = [f"{name}_q", f"{name}_scale", *([f"{name}_zero"] if asymmetric else [])]
            graph.node.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_d"], axis=1))
            node.input[1] = f"{name}_d"
        else:
            points = ["", f"{name}_zero"] if asymmetric else []
            node.op_type, node.name = "MatMulInteger", f"{node.name}_quant"
            del node.input[:]
            node.input.extend(["x", f"{name}_q", *points])
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_integer_weights_keep_the_zeros(form: str, asymmetric: bool, tmp_path: Path) -> None:
    model = tiny_model("bert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    path = quantized(export(model, tmp_path / "a.onnx"), tmp_path / "b.onnx", form, asymmetric=asymmetric)
    check_masks_in_onnx(path, model)  # small weights round to zero, too: they are no error
    linear = layer_linears(model)[QUERY]
    with torch.no_grad():
        linear.weight[linear.weight.abs() == linear.weight.abs().max()] = 0
    with pytest.raises(ParityError, match="1 of them lost"):
        check_masks_in_onnx(path, model)


@pytest.mark.parametrize(
    ("method", "engine", "per_channel"),
    [("dynamic", "onnxruntime", True), ("static", "onnxruntime", True), ("static", "deepsparse", False)],
)
def test_files_of_our_quantizer_keep_the_zeros(
    method: str, engine: EngineName, per_channel: bool, tmp_path: Path
) -> None:
    model = tiny_model("distilbert")
    random_masks(model, SparsityConfig(sparsity=0.6), 0)
    settings = ExportSettings(shapes="static", batch_size=2, seq_len=9, opset=16)
    source, target = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export_encoder(model, dummy_inputs(model, settings), ["last_hidden_state"], source, settings)
    config = Int8Config.model_validate({"method": method, "per_channel": per_channel})
    data = [{name: value.numpy() for name, value in batch.items()} for batch in [tiny_inputs(model)]]
    quantize(source, target, settings_of(config, engine), batches=data)
    check_masks_in_onnx(target, model)


def test_a_gemm_with_transposed_weights_and_a_product_of_two_activations(tmp_path: Path) -> None:
    """Forms that other exporters write: Gemm with [outputs, inputs]; and a right-hand side that is not constant."""
    model = random_resized(tiny_model("bert", num_hidden_layers=1), {"0.attention": 0, "0.ffn": 8})
    random_masks(model, SparsityConfig(sparsity=0.5), 0)
    first, second = layer_linears(model).items()
    weights = {"a": first[1].weight.detach().numpy(), "b": second[1].weight.detach().numpy()}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32])]
    nodes = [
        helper.make_node("Identity", ["b"], ["same"]),
        helper.make_node("Gemm", ["x", "a"], ["h"], name=f"/{first[0].replace('.', '/')}/Gemm", transB=1),
        helper.make_node("Gemm", ["h", "same"], ["y"], name=f"/model/{second[0].replace('.', '/')}/Gemm", transB=1),
    ]
    check_masks_in_onnx(write(tmp_path / "a.onnx", nodes, inputs, outputs, weights), model)
    nodes[0] = helper.make_node("Mul", ["b", "b"], ["same"])
    with pytest.raises(ParityError, match="without constant weights"):
        check_masks_in_onnx(write(tmp_path / "b.onnx", nodes, inputs, outputs, weights), model)
