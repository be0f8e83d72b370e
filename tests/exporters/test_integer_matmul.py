"""QDQ files as MatMulInteger: the same answers in ONNX Runtime, DeepSparse takes them, other forms are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import ExportError, to_integer_matmul
from tests.helpers.int8_files import Exported, answer, exported, node_named, quantize_static, settings_of
from tests.helpers.models import tiny_model
from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.compression.int8.quantize import linear_names, quantize, quantized_linears
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.recipe import Int8Config

PER_TENSOR = Int8Config(method="static", per_channel=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("float32"))


@pytest.fixture(scope="module")
def pairs(source: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The QDQ form, before the conversion; the biases as DeepSparse wants them."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.onnx"
    quantize(source.path, path, settings_of(PER_TENSOR, "openvino"), batches=source.batches)
    return path


def test_answers_are_those_of_the_pairs(tmp_path: Path, source: Exported, pairs: Path) -> None:
    target = tmp_path / "integer.onnx"
    to_integer_matmul(pairs, target)
    for batch in source.batches:
        np.testing.assert_allclose(answer(target, batch), answer(pairs, batch), atol=2e-6)
    assert quantized_linears(target) == linear_names(source.path)


def test_the_graph_is_the_fast_pattern(tmp_path: Path, pairs: Path) -> None:
    target = tmp_path / "integer.onnx"
    to_integer_matmul(pairs, target)
    model = onnx.load(str(target))
    onnx.checker.check_model(model, full_check=True)
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["MatMulInteger"], count["QuantizeLinear"], count["DequantizeLinear"]) == (12, 4 * 2, 0)
    assert {(item.domain, item.version) for item in model.opset_import} == {("", 16)}
    assert model.ir_version <= 9
    followers = {node.input[0]: node for node in model.graph.node if node.op_type in ("Cast", "Mul")}
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            cast = followers[node.output[0]]
            scale = followers[cast.output[0]]
            reader = next(other for other in model.graph.node if scale.output[0] in other.input)
            assert (cast.op_type, scale.op_type, reader.op_type) == ("Cast", "Mul", "Add")
    names = [item.name for item in model.graph.initializer]
    assert len(names) == len(set(names))
    assert sum(numpy_helper.to_array(item).nbytes for item in model.graph.initializer) < pairs.stat().st_size


def test_files_of_onnx_runtimes_quantizer(tmp_path: Path, source: Exported) -> None:
    """There the residual stream reads the rounded tensors, too: those pairs stay."""
    quantize_static(source.path, tmp_path / "static.onnx", source.batches, reduce_range=True)
    to_integer_matmul(tmp_path / "static.onnx", tmp_path / "integer.onnx")
    batch = source.batches[0]
    np.testing.assert_allclose(
        answer(tmp_path / "integer.onnx", batch), answer(tmp_path / "static.onnx", batch), atol=2e-6
    )
    count = Counter(node.op_type for node in onnx.load(str(tmp_path / "integer.onnx")).graph.node)
    assert count["MatMulInteger"] == 12
    assert count["DequantizeLinear"] > 0


def test_float32_linears_stay(tmp_path: Path, source: Exported) -> None:
    kept = linear_names(source.path)[3:5]
    target = tmp_path / "integer.onnx"
    quantize(source.path, target, settings_of(PER_TENSOR, "deepsparse"), keep_fp32=kept, batches=source.batches)
    assert set(linear_names(source.path)) - set(quantized_linears(target)) == set(kept)
    assert np.abs(answer(target, source.batches[0]) - answer(source.path, source.batches[0])).max() < 0.15


def per_channel(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_weight_DequantizeLinear")
    scale = next(item for item in graph.initializer if item.name == pair.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.full(32, 0.1, np.float32), scale.name))


def asymmetric_weight(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_weight_DequantizeLinear")
    zero = next(item for item in graph.initializer if item.name == pair.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.asarray(np.int8(3)), zero.name))


def unlike_scales(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_0_DequantizeLinear")
    graph.initializer.append(numpy_helper.from_array(np.asarray(np.float32(7)), "other"))
    pair.input[1] = "other"


def signed_activation(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_0_DequantizeLinear")
    zero = next(item for item in graph.initializer if item.name == pair.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.asarray(np.int8(3)), zero.name))


def one_side(graph: onnx.GraphProto) -> None:
    matmul = node_named(graph, "layer.0/attention/self/query/MatMul")
    pair = next(node for node in graph.node if node.output[0] == matmul.input[0])
    quantize_node = next(node for node in graph.node if node.output[0] == pair.input[0])
    matmul.input[0] = quantize_node.input[0]


def computed_weight(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_weight_DequantizeLinear")
    node = helper.make_node("Identity", [pair.input[0]], ["computed"], name="computed")
    pair.input[0] = "computed"
    graph.node.insert(0, node)


def computed_scale(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_weight_DequantizeLinear")
    node = helper.make_node("Identity", [pair.input[1]], ["computed"], name="computed")
    pair.input[1] = "computed"
    graph.node.insert(0, node)


def float_weight(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "layer.0/attention/self/query/MatMul_weight_DequantizeLinear")
    weight = next(item for item in graph.initializer if item.name == pair.input[0])
    weight.CopyFrom(numpy_helper.from_array(np.zeros((32, 32), np.uint8), weight.name))


def unpaired(graph: onnx.GraphProto) -> None:
    pair = node_named(graph, "_0_DequantizeLinear")
    graph.input.append(helper.make_tensor_value_info("integers", TensorProto.UINT8, [2, 9, 32]))
    pair.input[0] = "integers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (per_channel, "one scale for each tensor around /wrapped/bert/encoder/layer.0.*found 32"),
        (asymmetric_weight, "a symmetric weight in .*found the zero point 3"),
        (unlike_scales, "found uint8 or two different"),
        (signed_activation, "found int8 or two different"),
        (one_side, "both inputs of .*query/MatMul quantized, or none, found one"),
        (computed_weight, "a constant int8 weight in .*found another right input"),
        (float_weight, "a constant int8 weight in .*found another right input"),
        (computed_scale, r"found computed ones \(dynamic INT8\)"),
        (unpaired, "a QuantizeLinear before the left input of"),
    ],
)
def test_other_forms_are_refused(
    tmp_path: Path, pairs: Path, change: Callable[[onnx.GraphProto], None], message: str
) -> None:
    model = onnx.load(str(pairs))
    change(model.graph)
    onnx.save(model, str(tmp_path / "changed.onnx"))
    (tmp_path / "target.onnx").write_text("what was there before")
    with pytest.raises(ExportError, match=message):
        to_integer_matmul(tmp_path / "changed.onnx", tmp_path / "target.onnx")
    assert (tmp_path / "target.onnx").read_text() == "what was there before"


def test_files_without_pairs_and_files_that_are_none(tmp_path: Path, source: Exported) -> None:
    with pytest.raises(ExportError, match=r"expected quantized MatMul nodes in .* found none"):
        to_integer_matmul(source.path, tmp_path / "target.onnx")
    with pytest.raises(ExportError, match=r"expected opset <= 16 in .* found 17"):
        to_integer_matmul(write_mlp(tmp_path / "mlp.onnx", 4), tmp_path / "target.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"this is not a protobuf")
    for name in ("broken.onnx", "missing.onnx"):
        with pytest.raises(ExportError, match="expected an ONNX file at"):
            to_integer_matmul(tmp_path / name, tmp_path / "target.onnx")


def test_deepsparse_answers_like_onnx_runtime(tmp_path: Path) -> None:
    try:
        engine = get_engine("deepsparse")
        engine.version()
    except EngineError as error:
        pytest.skip(f"DeepSparse is not set up: {error}")
    # Widths that its vector kernels take.
    model = tiny_model("bert", "text-classification", num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    source = exported(tmp_path, model=model)
    target = tmp_path / "integer.onnx"
    kept = linear_names(source.path)[4:5]
    quantize(source.path, target, settings_of(PER_TENSOR, "deepsparse"), keep_fp32=kept, batches=source.batches)
    with engine.start_worker(WorkerOptions(batch_size=2, seq_len=9)) as worker:
        worker.load("a", target)
        for batch in source.batches[:2]:
            np.testing.assert_allclose(worker.infer("a", batch)["logits"], answer(target, batch), atol=1e-4)
