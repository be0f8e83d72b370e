"""INT8 files: which linears, in which form, with which scales, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters import ExportSettings, dummy_inputs, export_encoder
from tests.helpers.int8_files import (
    QUERY,
    Exported,
    answer,
    constants,
    exported,
    int8,
    node_named,
    pair_parameters,
    quantize_static,
    settings_of,
    without_padding,
)
from tests.helpers.models import BLOCK_TYPES, LINEARS_A_LAYER, tiny_model
from tests.helpers.onnx_models import kernels_of, write_mlp
from ziplm_deploy.compression.int8.fake_quant import quantizable_linears
from ziplm_deploy.compression.int8.quantize import linear_names, linear_ranges, quantize, quantized_linears
from ziplm_deploy.compression.int8.scales import ActivationRange, LinearScales, default_reduce_range
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import CorruptArtifactError, DataError, NumericalError, UsageError
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.recipe import Int8Config

STATIC = Int8Config(method="static")
PER_TENSOR = Int8Config(method="static", per_channel=False)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("static"), "static")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("dynamic"), "dynamic", opset=17)


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_the_linears_of_every_architecture_are_found(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, num_hidden_layers=1) if model_type != "distilbert" else tiny_model(model_type)
    found = exported(tmp_path, model=model)
    names = linear_names(found.path)
    assert set(names) == set(quantizable_linears(model))
    assert len(names) == LINEARS_A_LAYER.get(model_type, 6) * (3 if model_type == "distilbert" else 1)


@pytest.mark.parametrize("config", [Int8Config(), Int8Config(per_channel=False), STATIC, PER_TENSOR])
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_every_linear_computes_in_integers_and_answers_stay_close(
    tmp_path: Path, static: Exported, dynamic: Exported, shapes: str, config: Int8Config
) -> None:
    source = static if shapes == "static" else dynamic
    target = int8(source, tmp_path / "int8.onnx", config)
    assert quantized_linears(target) == linear_names(source.path)
    for batch in source.batches:
        expected, found = answer(source.path, batch), answer(target, batch)
        assert 0 < np.abs(expected - found).max() < 0.15
    # ONNX Runtime's integer kernels, not float32 ones around dequantized weights, are what makes the file fast.
    kernels = kernels_of(target)
    assert kernels["MatMulIntegerToFloat"] + kernels["DynamicQuantizeMatMul"] == 12
    assert kernels["DequantizeLinear"] == kernels["SkipLayerNormalization"] == 0


def test_a_pruned_model_with_dropped_modules(tmp_path: Path) -> None:
    model = random_resized(tiny_model("bert"), {"0.attention": 1, "0.ffn": 3, "1.attention": 0, "2.ffn": 0})
    source = exported(tmp_path, model=model)
    for config in (Int8Config(), STATIC):
        target = int8(source, tmp_path / "int8.onnx", config)
        assert quantized_linears(target) == linear_names(source.path)
        assert np.abs(answer(source.path, source.batches[0]) - answer(target, source.batches[0])).max() < 0.5


@pytest.mark.parametrize("reduce_range", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_integers_and_scales_are_those_of_onnx_runtimes_quantizer(
    tmp_path: Path, dynamic: Exported, per_channel: bool, reduce_range: bool
) -> None:
    config = Int8Config(method="static", per_channel=per_channel)
    batches = without_padding(dynamic.batches)  # ONNX Runtime counts padding like any token
    ours = pair_parameters(int8(dynamic, tmp_path / "ours.onnx", config, reduce_range=reduce_range, batches=batches))
    settings = {"per_channel": per_channel, "reduce_range": reduce_range}
    quantize_static(dynamic.path, tmp_path / "theirs.onnx", batches, **settings)
    theirs = pair_parameters(tmp_path / "theirs.onnx")
    assert len(ours) == 12
    assert np.abs(next(iter(ours.values()))["weight"]).max() == (64 if reduce_range else 127)
    for name, parameters in ours.items():
        for key, value in parameters.items():
            # Calibration runs the optimized graph here, and the plain one there.
            tolerance = 1e-6 if key == "activation_scale" else 0
            np.testing.assert_allclose(value, theirs[name][key], rtol=tolerance, err_msg=f"{name} {key}")
            assert value.dtype == theirs[name][key].dtype


def test_the_residual_stream_is_not_rounded(tmp_path: Path, static: Exported) -> None:
    graph = onnx.load(str(int8(static, tmp_path / "int8.onnx", STATIC))).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.op_type for node in graph.node if dequantized.intersection(node.input)}
    assert readers == {"MatMul"}
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 4 * 2  # q, k and v share one


class _Counted(np.ndarray[Any, Any]):
    __hash__ = object.__hash__  # type: ignore[assignment]

    @classmethod
    def of(cls, array: np.ndarray) -> _Counted:
        return array.copy().view(cls)


def test_given_ranges_spare_the_calibration(tmp_path: Path, static: Exported) -> None:
    ranges = linear_ranges(static.path, static.batches, STATIC)
    given = int8(static, tmp_path / "given.onnx", STATIC, batches=(), ranges=ranges)
    assert given.read_bytes() == int8(static, tmp_path / "calibrated.onnx", STATIC).read_bytes()


@pytest.mark.parametrize("config", [Int8Config(), STATIC])
def test_kept_linears_stay_float32(tmp_path: Path, static: Exported, config: Int8Config) -> None:
    target = int8(static, tmp_path / "int8.onnx", config, keep_fp32=[QUERY])
    assert set(linear_names(static.path)) - set(quantized_linears(target)) == {QUERY}
    before, after = onnx.load(str(static.path)).graph, onnx.load(str(target)).graph
    ending = "layer.0/attention/self/query/MatMul"
    old, new = node_named(before, ending), node_named(after, ending)
    assert list(old.input) == list(new.input)  # neither its weight nor its input are rounded
    np.testing.assert_array_equal(constants(before)[old.input[1]], constants(after)[new.input[1]])


@pytest.mark.parametrize("config", [Int8Config(), STATIC])
def test_linears_that_share_weights_and_biases(tmp_path: Path, config: Int8Config) -> None:
    model = tiny_model("bert", "text-classification", num_hidden_layers=2)
    layers = model.bert.encoder.layer  # type: ignore[union-attr]
    with torch.no_grad():
        layers[1].load_state_dict(layers[0].state_dict())
        for layer in layers:
            for name, parameter in layer.named_parameters():
                if name.endswith("bias") and "LayerNorm" not in name:
                    parameter.zero_()
    source = exported(tmp_path, model=model)
    target = int8(source, tmp_path / "int8.onnx", config, keep_fp32=[QUERY])
    assert len(quantized_linears(target)) == 11
    assert np.abs(answer(source.path, source.batches[0]) - answer(target, source.batches[0])).max() < 0.15


def test_a_linear_whose_inputs_and_weights_are_zero(tmp_path: Path) -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    layer = model.encoder.layer[0]  # type: ignore[union-attr]
    with torch.no_grad():
        for linear in (layer.intermediate.dense, layer.output.dense):
            linear.weight.zero_()
        layer.intermediate.dense.bias.zero_()
    source = exported(tmp_path, model=model)
    for config in (Int8Config(), STATIC, PER_TENSOR, Int8Config(method="static", ranges="percentile")):
        target = int8(source, tmp_path / "int8.onnx", config)
        assert np.abs(answer(source.path, source.batches[0]) - answer(target, source.batches[0])).max() < 0.3


def test_openvino_runs_the_static_form(tmp_path: Path, static: Exported) -> None:
    target = int8(static, tmp_path / "int8.onnx", STATIC, engine="openvino")
    expected = answer(int8(static, tmp_path / "ort.onnx", STATIC), static.batches[0])
    with get_engine("openvino").start_worker(WorkerOptions(batch_size=2, seq_len=9)) as worker:
        worker.load("a", target)
        found = worker.infer("a", static.batches[0])["logits"]
    assert np.abs(found - expected).max() < 0.05


def test_the_quantizer_is_quiet(
    tmp_path: Path, static: Exported, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    for config in (Int8Config(), Int8Config(method="static", ranges="percentile")):
        int8(static, tmp_path / "int8.onnx", config)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    assert (logging.getLogger().handlers, logging.getLogger().filters) == (handlers, filters)


def test_a_file_can_be_quantized_in_place(tmp_path: Path, static: Exported) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(static.path.read_bytes())
    quantize(path, path, settings_of(STATIC), batches=static.batches)
    assert len(quantized_linears(path)) == 12
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(UsageError, match="found none; choose a file that ziplm-deploy exported"):
        quantize(path, path, settings_of(STATIC), batches=static.batches)
    assert len(quantized_linears(path)) == 12


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("sse4_2", "avx", "avx2", "fma"), True),
        (("avx2", "avx512f", "avx512bw"), True),
        (("avx2", "avx512f", "avx512_vnni"), False),
        (("avx2", "avx_vnni"), False),
        (("avx512f", "amx_int8"), False),
        (("asimd", "asimddp"), False),
        ((), True),  # unknown: seven bits never saturate
    ],
)
def test_weights_get_seven_bits_where_products_saturate(flags: tuple[str, ...], expected: bool) -> None:
    machine = MachineInfo(
        cpu_model="x", isa_flags=flags, logical_cores=1, usable_cores=1, memory_bytes=1, operating_system="x"
    )
    assert default_reduce_range(machine) is expected


def scales(**changes: Any) -> LinearScales:
    values = {"activation_scale": 0.1, "activation_zero_point": 3, "weight_scale": (0.1,), "weight_limit": 64}
    return LinearScales(**(values | changes))


RANGES = {"some": ActivationRange(-1, 1)}


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        (STATIC, {"batches": ()}, DataError, "calibration batches with tokens for static INT8, found none"),
        (STATIC, {"batches": [{}]}, DataError, "found no 'input_ids' in a batch"),
        (STATIC, {"keep_fp32": ["layer.7.query"]}, UsageError, "keep_fp32, such as bert.*found 'layer.7.query'"),
        (Int8Config(), {"engine": "openvino"}, UsageError, "static or qat for openvino, found dynamic"),
        (Int8Config(), {"engine": "deepsparse"}, UsageError, "static or qat for deepsparse, found dynamic"),
        (Int8Config(), {"ranges": RANGES}, UsageError, "no ranges for int8.method dynamic"),
        (STATIC, {"engine": "deepsparse"}, UsageError, "per_channel: false for deepsparse"),
        (STATIC, {"ranges": RANGES}, UsageError, f"expected a range for {QUERY}, found none"),
        (Int8Config(method="qat"), {}, UsageError, "scales that training learned for int8.method qat, found none"),
        (Int8Config(method="qat"), {"ranges": RANGES}, UsageError, "scales that training learned"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    tmp_path: Path,
    static: Exported,
    config: Int8Config,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    (tmp_path / "int8.onnx").write_text("what was there before")
    with pytest.raises(error, match=message):
        int8(static, tmp_path / "int8.onnx", config, **settings)
    assert (tmp_path / "int8.onnx").read_text() == "what was there before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (scales(weight_limit=127), "weights within ±64, found ±127"),
        (scales(weight_scale=(0.1, 0.2)), r"expected 1 weight scale\(s\).*found 2"),
        (scales(weight_scale=(0.0,)), "positive scales"),
        (scales(activation_scale=float("nan")), "positive scales"),
        (scales(activation_zero_point=256), "zero point in 0 … 255"),
        (ActivationRange(2.0, 1.0), "low <= high"),
        (ActivationRange(0.0, float("inf")), "finite range"),
        (ActivationRange(float("nan"), 1.0), "finite range"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(
    tmp_path: Path, static: Exported, given: ActivationRange | LinearScales, message: str
) -> None:
    ranges: dict[str, Any] = {**dict.fromkeys(linear_names(static.path), scales()), QUERY: given}
    with pytest.raises(UsageError, match=message):
        int8(static, tmp_path / "int8.onnx", PER_TENSOR, ranges=ranges)


def test_all_linears_in_float32_are_refused(tmp_path: Path, static: Exported) -> None:
    with pytest.raises(UsageError, match="found all 12 in keep_fp32"):
        int8(static, tmp_path / "int8.onnx", STATIC, keep_fp32=linear_names(static.path))


@pytest.mark.parametrize("config", [Int8Config(), STATIC])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, config: Int8Config) -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    source = exported(tmp_path, model=model)
    broken = onnx.load(str(source.path))
    name = node_named(broken.graph, "output/dense/MatMul").input[1]
    tensor = next(item for item in broken.graph.initializer if item.name == name)
    tensor.raw_data = np.full(list(tensor.dims), np.nan, np.float32).tobytes()
    onnx.save(broken, str(source.path))
    with pytest.raises(NumericalError, match=r"finite weights of encoder\.layer\.0\.attention\.output\.dense"):
        int8(source, tmp_path / "int8.onnx", config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ranges", ["minmax", "percentile"])
def test_activations_that_are_not_finite_name_the_linear(tmp_path: Path, value: float, ranges: str) -> None:
    model = tiny_model("bert", num_hidden_layers=2)
    source = exported(tmp_path, model=model)
    broken = onnx.load(str(source.path))
    add = node_named(broken.graph, "layer.0/intermediate/dense/Add")
    bias = next(item for item in broken.graph.initializer if item.name in add.input)
    array = constants(broken.graph)[bias.name].copy()
    array[3] = value  # one of many: the smallest and the largest of the others are finite
    bias.raw_data = array.tobytes()
    onnx.save(broken, str(source.path))
    with pytest.raises(NumericalError, match=r"finite inputs of encoder\.layer\.0\.output\.dense"):
        int8(source, tmp_path / "int8.onnx", Int8Config(method="static", ranges=ranges))  # type: ignore[arg-type]


def test_batches_that_the_model_does_not_take(tmp_path: Path, static: Exported, dynamic: Exported) -> None:
    wide = {name: np.repeat(array, 2, axis=1) for name, array in static.batches[0].items()}
    with pytest.raises(DataError, match="batches that the model takes"):
        int8(static, tmp_path / "int8.onnx", STATIC, batches=[wide])
    empty = {name: array[:0] for name, array in dynamic.batches[0].items()}
    with pytest.raises(DataError, match="expected calibration"):
        int8(dynamic, tmp_path / "int8.onnx", STATIC, batches=[empty])


def test_files_without_linears_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="linears inside numbered layers"):
        quantize(write_mlp(tmp_path / "mlp.onnx", 8), tmp_path / "int8.onnx", settings_of(Int8Config()))
    for content in (b"", b"this is not a protobuf"):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(CorruptArtifactError, match="expected an ONNX file"):
            quantize(tmp_path / "broken.onnx", tmp_path / "int8.onnx", settings_of(Int8Config()))
    with pytest.raises(CorruptArtifactError, match="expected an ONNX file"):
        linear_names(tmp_path / "missing.onnx")


def test_deepsparse_needs_static_shapes_and_an_old_opset(tmp_path: Path, dynamic: Exported) -> None:
    with pytest.raises(UsageError, match="cannot be quantized for DeepSparse: expected opset <= 16"):
        int8(dynamic, tmp_path / "int8.onnx", PER_TENSOR, engine="deepsparse")
    source = exported(tmp_path, "dynamic", opset=16)
    with pytest.raises(UsageError, match="expected static shapes"):
        int8(source, tmp_path / "int8.onnx", PER_TENSOR, engine="deepsparse")
    assert not (tmp_path / "int8.onnx").exists()


def test_embedding_models_keep_their_names(tmp_path: Path) -> None:
    from exporters import EmbeddingModel

    model = tiny_model("bert", num_hidden_layers=1)
    settings = ExportSettings("static", 16, 2, 9)
    wrapped = EmbeddingModel(model, "mean", True)
    inputs = dummy_inputs(wrapped, settings)
    path = tmp_path / "m.onnx"
    export_encoder(wrapped, inputs, ["last_hidden_state", "sentence_embedding"], path, settings)
    assert set(linear_names(path)) == set(quantizable_linears(model))
