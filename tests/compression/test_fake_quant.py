"""Fake quantization: torch rounds as the exported file does, gradients are LSQ's, scales are learned and exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from tests.helpers.int8_files import Exported, answer, exported, pair_parameters, settings_of, tensors
from tests.helpers.models import BLOCK_TYPES, LINEARS_A_LAYER, output_tensors, tiny_inputs, tiny_model
from ziplm_deploy.compression.int8.fake_quant import (
    ActivationQuantizer,
    QuantizedLinear,
    insert_fake_quant,
    learned_ranges,
    module_ranges,
    quantizable_linears,
    remove_fake_quant,
)
from ziplm_deploy.compression.int8.quantize import linear_ranges, quantize
from ziplm_deploy.compression.int8.scales import ActivationRange, LinearScales
from ziplm_deploy.errors import DataError, NumericalError, UsageError
from ziplm_deploy.recipe import Int8Config

QAT = Int8Config(method="qat")
QAT_PER_TENSOR = Int8Config(method="qat", per_channel=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("float32"))


def quantized(source: Exported, config: Int8Config = QAT, reduce_range: bool = True) -> nn.Module:
    """A copy of the model with quantized linears."""
    model = copy.deepcopy(source.model)
    ranges = module_ranges(model, map(tensors, source.batches))
    insert_fake_quant(model, ranges, settings_of(config, reduce_range=reduce_range))
    return model


def plain(low: float = -1.0, high: float = 2.0, **settings: Any) -> QuantizedLinear:
    values = ActivationRange(low, high)
    torch.manual_seed(0)
    return QuantizedLinear(
        nn.Linear(6, 4), ActivationQuantizer(values), **({"per_channel": True, "limit": 64} | settings)
    )


def learn(model: nn.Module, steps: int, lr: float = 1e-2) -> list[float]:
    """Train all parameters on fixed targets."""
    torch.manual_seed(1)
    inputs = tiny_inputs(model, 4, 9)
    target = torch.randn(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(**inputs).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config", [QAT, QAT_PER_TENSOR])
@pytest.mark.parametrize("trained", [False, True])
def test_torch_rounds_as_the_exported_file_does(
    tmp_path: Path, source: Exported, config: Int8Config, trained: bool
) -> None:
    model = quantized(source, config)
    if trained:
        learn(model, 5)
    learned = learned_ranges(model)
    expected = [output_tensors(model, tensors(batch))["logits"].numpy() for batch in source.batches]
    remove_fake_quant(model)
    float32 = exported(tmp_path, model=model)
    target = tmp_path / "int8.onnx"
    quantize(float32.path, target, settings_of(config), ranges=learned)
    for batch, logits in zip(source.batches, expected, strict=True):
        np.testing.assert_allclose(answer(target, batch), logits, atol=1e-3)
        assert np.abs(answer(float32.path, batch) - logits).max() > 3e-3  # the tolerance tells them apart
    parameters = {
        name.removeprefix("/wrapped/").replace("/", "."): value for name, value in pair_parameters(target).items()
    }
    for name, scales in learned.items():
        found = parameters[f"{name}.MatMul"]
        assert found["activation_scale"].item() == scales.activation_scale
        assert found["activation_zero_point"].item() == scales.activation_zero_point
        assert np.atleast_1d(found["weight_scale"]).tolist() == list(scales.weight_scale)
        assert np.abs(found["weight"]).max() <= 64


def test_before_training_scales_are_those_of_static_quantization(tmp_path: Path, source: Exported) -> None:
    """Observed in torch or calibrated in ONNX Runtime: the same ranges, so training starts from static INT8."""
    found = module_ranges(source.model, map(tensors, source.batches))
    expected = linear_ranges(source.path, source.batches, QAT)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert (values.low, values.high) == pytest.approx((expected[name].low, expected[name].high), rel=1e-5, abs=1e-5)
    quantize(source.path, tmp_path / "a.onnx", settings_of(QAT), ranges=learned_ranges(quantized(source)))
    quantize(source.path, tmp_path / "b.onnx", settings_of(Int8Config(method="static")), ranges=found)
    for name, a in pair_parameters(tmp_path / "a.onnx").items():
        for key, value in pair_parameters(tmp_path / "b.onnx")[name].items():
            np.testing.assert_array_equal(a[key], value)


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_insert_and_remove_on_every_architecture(model_type: str) -> None:
    model = tiny_model(model_type)
    inputs = tiny_inputs(model)
    before = output_tensors(model, inputs)
    keys = list(model.state_dict())
    linears = quantizable_linears(model)
    inserted = insert_fake_quant(model, module_ranges(model, [inputs]), settings_of(QAT, reduce_range=False))
    assert inserted.keys() == linears.keys()
    assert len(inserted) == 3 * LINEARS_A_LAYER.get(model_type, 6)
    assert len({id(linear.activation) for linear in inserted.values()}) == 12  # q, k and v share, and so does a gate
    assert all(inserted[name].weight is linear.weight for name, linear in linears.items())
    assert set(keys) <= model.state_dict().keys()
    rounded = output_tensors(model, inputs)
    remove_fake_quant(model)
    after = output_tensors(model, inputs)
    assert list(model.state_dict()) == keys
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        assert 0 < (rounded[name] - tensor).abs().max() < 0.5


def test_kept_linears_stay_plain(source: Exported) -> None:
    model = copy.deepcopy(source.model)
    ranges = module_ranges(model, map(tensors, source.batches))
    names = list(ranges)
    inserted = insert_fake_quant(model, ranges, settings_of(QAT), keep_fp32=names[:2])
    assert list(inserted) == names[2:]
    assert type(model.get_submodule(names[0])) is nn.Linear


def reference(x: Tensor, s: Tensor, n: float, p: float) -> Tensor:
    """LSQ by automatic differentiation, without its factor: rounding is passed straight through."""
    v = (x / s).clamp(n, p)
    return (v + (v.round() - v).detach()) * s


@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_are_those_of_lsq(per_channel: bool) -> None:
    linear = plain(per_channel=per_channel)
    with torch.no_grad():
        linear.weight_log_ratio.fill_(-0.3)  # some weights are outside of the range
        linear.activation.log_ratio.fill_(-0.2)
    x = (3 * torch.randn(5, 6)).requires_grad_()
    coefficients = torch.randn(5, 4)
    (linear(x) * coefficients).sum().backward()
    found = {"x": x.grad, "weight": linear.weight.grad, "s_w": linear.weight_log_ratio.grad}
    found["s_a"] = linear.activation.log_ratio.grad

    y = x.detach().clone().requires_grad_()
    weight = linear.weight.detach().clone().requires_grad_()
    log_w, log_a = (t.detach().clone().requires_grad_() for t in (linear.weight_log_ratio, linear.activation.log_ratio))
    zero = float(linear.activation.zero_point)
    a = reference(y, linear.activation.initial_scale * log_a.exp(), -zero, 255 - zero)
    w = reference(weight, linear.initial_weight_scale * log_w.exp(), -64, 64)
    output = nn.functional.linear(a, w, linear.bias.detach())
    (output * coefficients).sum().backward()
    assert torch.allclose(output, linear(x), atol=1e-6)
    assert y.grad is not None
    assert (y.grad == 0).any()
    expected = {"x": y.grad, "weight": weight.grad}
    size = 6 if per_channel else 24
    expected["s_w"] = log_w.grad / (size * 64) ** 0.5  # type: ignore[operator]
    expected["s_a"] = log_a.grad / (30 * max(zero, 255 - zero)) ** 0.5  # type: ignore[operator]
    for name, gradient in expected.items():
        assert gradient is not None
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def test_integers_are_within_their_range_and_zeros_stay_zero() -> None:
    for limit in (64, 127):
        linear = plain(0.5, 2.0, limit=limit)
        assert float(linear.activation.zero_point) == 0
        with torch.no_grad():
            linear.weight[1, 2:] = 0.0
            linear.weight_log_ratio.fill_(-1.0)
        eye = torch.eye(6) * 2.0
        rows = (linear(eye) - linear.bias) / 2.0  # [in, out]: the rounded weight
        integers = rows.T / linear.weight_scale
        assert torch.allclose(integers, integers.round(), atol=1e-3)
        assert integers.abs().max() <= limit + 1e-3
        assert torch.equal(integers[1, 2:], torch.zeros(4))


def test_masked_weights_get_their_gradient_at_the_same_path() -> None:
    """Who holds zeros finds weights by their path: it must not change, and the parameter is the one that is trained."""
    model = tiny_model("bert", "text-classification", num_hidden_layers=1)
    names = {name for name, _ in model.named_parameters()}
    insert_fake_quant(model, module_ranges(model, [tiny_inputs(model)]), settings_of(QAT))
    assert names <= {name for name, _ in model.named_parameters()}
    model(**tiny_inputs(model)).logits.sum().backward()
    assert all(linear.weight.grad is not None for linear in quantizable_linears(model).values())


def test_training_moves_scales_and_lowers_the_loss(source: Exported) -> None:
    model = quantized(source)
    before = learned_ranges(model)
    losses = learn(model, 30)
    assert losses[-1] < 0.2 * losses[0]
    after = learned_ranges(model)
    for name, scales in after.items():
        assert 0.3 < scales.activation_scale / before[name].activation_scale < 3
        assert scales.activation_scale != before[name].activation_scale
        assert scales.weight_scale != before[name].weight_scale
        assert scales.activation_zero_point == before[name].activation_zero_point
        assert min(scales.weight_scale) > 0


def test_state_is_saved_and_loaded_with_its_shared_scales(tmp_path: Path, source: Exported) -> None:
    model = quantized(source)
    learn(model, 3)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = quantized(source)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert learned_ranges(other) == learned_ranges(model)
    batch = tensors(source.batches[0])
    assert torch.equal(output_tensors(other, batch)["logits"], output_tensors(model, batch)["logits"])


def test_lower_precision_is_rounded_in_float32() -> None:
    linear = plain()
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (linear(x.bfloat16()).float() - linear(x)).abs().max() < 0.05
    assert plain().to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_ranges_are_those_of_tokens_and_leave_the_mode_alone(source: Exported) -> None:
    model = copy.deepcopy(source.model)
    model.train()
    model.bert.embeddings.eval()  # type: ignore[operator, union-attr]
    modes = [module.training for module in model.modules()]
    inputs = tensors(source.batches[0])
    inputs["attention_mask"] = torch.tensor([[1, 1] + [0] * 7, [1] * 3 + [0] * 6])
    found = module_ranges(model, [inputs])
    name = "bert.encoder.layer.0.output.dense"
    hidden = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model.eval()
    output_tensors(model, inputs)
    handle.remove()
    tokens = hidden[0][inputs["attention_mask"].bool()]
    assert found[name] == ActivationRange(float(tokens.min()), float(tokens.max()))
    assert found[name] != ActivationRange(float(hidden[0].min()), float(hidden[0].max()))  # so the test can fail
    model.train()
    model.bert.embeddings.eval()  # type: ignore[operator, union-attr]
    assert [module.training for module in model.modules()] == modes


def test_some_linears_only(source: Exported) -> None:
    names = list(quantizable_linears(source.model))[1:3]
    assert list(module_ranges(source.model, [tensors(source.batches[0])], names)) == names


def test_what_does_not_fit_is_refused(source: Exported) -> None:
    model = copy.deepcopy(source.model)
    with pytest.raises(DataError, match=r"reaches bert\.encoder\.layer\.0.*query, found none"):
        module_ranges(model, [])
    with pytest.raises(UsageError, match="found 'layer'"):
        module_ranges(model, [], ["layer"])
    with pytest.raises(UsageError, match="expected a range for bert"):
        insert_fake_quant(model, {}, settings_of(QAT))
    with pytest.raises(UsageError, match="expected a model with quantized linears"):
        learned_ranges(model)
    ranges = module_ranges(model, [tensors(source.batches[0])])
    with pytest.raises(UsageError, match="found 'layer'"):
        insert_fake_quant(model, ranges, settings_of(QAT), keep_fp32=["layer"])
    insert_fake_quant(model, ranges, settings_of(QAT))
    with pytest.raises(UsageError, match=r"found quantized ones; call remove_fake_quant first"):
        insert_fake_quant(model, ranges, settings_of(QAT))
    with torch.no_grad():
        next(iter(quantizable_linears(model).values())).activation.log_ratio.fill_(1e4)  # type: ignore[union-attr]
    with pytest.raises(NumericalError, match=r"finite scales of bert\.encoder\.layer\.0"):
        learned_ranges(model)
    remove_fake_quant(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[0] = torch.inf  # type: ignore[index, union-attr]
    with pytest.raises(NumericalError, match=r"finite inputs of bert\.encoder\.layer\.0\.output\.dense"):
        module_ranges(model, [tensors(source.batches[0])])


def test_learned_scales_of_another_weight_range_are_refused(tmp_path: Path, source: Exported) -> None:
    learned = learned_ranges(quantized(source, reduce_range=False))
    assert all(isinstance(scales, LinearScales) and scales.weight_limit == 127 for scales in learned.values())
    with pytest.raises(UsageError, match="reduce_range that was trained with"):
        quantize(source.path, tmp_path / "a.onnx", settings_of(QAT), ranges=learned)
    with pytest.raises(UsageError, match="per_channel that was trained with"):
        quantize(source.path, tmp_path / "a.onnx", settings_of(QAT_PER_TENSOR, reduce_range=False), ranges=learned)
