"""Weight-only linears: rounding as ONNX Runtime's own, and files that answer like the rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from exporters import DecoderExportSettings, ExportError, export_decoder, to_nbits_matmul
from exporters.names import HEAD, linear_of
from exporters.nbits_matmul import BLOCK_SIZE, round_blocks
from tests.helpers.decoder_models import causal_model, decoder_parts, skip_in_old_engine
from tests.helpers.int8_files import constants
from ziplm_deploy.engines.runner import onnx_runner

BATCH = {"input_ids": np.arange(3, 15).reshape(1, 12), "attention_mask": np.ones((1, 12), np.int64)}


def exported(case: str, folder: Path, form: Any = "onnxruntime", **changes: Any) -> Path:
    path = folder / f"{case}-{form}.onnx"
    settings = DecoderExportSettings(max_length=24, form=form)
    export_decoder(decoder_parts(causal_model(case, **changes)), path, settings)
    return path


def linear_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node if (name := linear_of(node.name)) is not None}


def with_rounded_weights(path: Path, bits: int) -> Path:
    """The same float32 graph, its linears with the weights that integers stand for."""
    model = onnx.load(path)
    stored = {item.name: item for item in model.graph.initializer}
    for node in linear_nodes(model).values():
        weight = numpy_helper.to_array(stored[node.input[1]])
        if node.op_type == "Gemm":  # another matrix: the embedding stays as it is
            rounded = numpy_helper.from_array(round_blocks(weight, bits).weight.copy(), "head.rounded")
            node.input[1] = rounded.name
            model.graph.initializer.append(rounded)
        else:
            rounded = np.ascontiguousarray(round_blocks(weight.T, bits).weight.T)
            stored[node.input[1]].CopyFrom(numpy_helper.from_array(rounded, node.input[1]))
    target = path.with_name(f"rounded-{bits}.onnx")
    onnx.save(model, target)
    return target


@given(
    n_outputs=st.integers(1, 5),
    n_inputs=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    seed=st.integers(0, 100),
    spread=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
)
@settings(deadline=None, max_examples=60)
def test_every_weight_is_within_a_step_and_zeros_stay(
    n_outputs: int, n_inputs: int, bits: int, seed: int, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((n_outputs, n_inputs)) * spread).astype(np.float32)
    weight[generator.random(weight.shape) < 0.3] = 0
    rounded = round_blocks(weight, bits)
    blocks = -(-n_inputs // BLOCK_SIZE)
    assert rounded.packed.dtype == np.uint8
    assert rounded.packed.shape == (n_outputs, blocks, BLOCK_SIZE * bits // 8)
    assert rounded.weight.shape == weight.shape
    steps = np.abs(rounded.scales).repeat(BLOCK_SIZE, axis=1)[:, :n_inputs]
    assert (np.abs(rounded.weight - weight) <= 1.001 * steps).all()  # half a step, but for what is clipped
    assert (rounded.weight[weight == 0] == 0).all()
    again = round_blocks(rounded.weight, bits)
    np.testing.assert_allclose(again.weight, rounded.weight, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_those_of_the_engines_own_quantizer(bits: int) -> None:
    from onnxruntime.capi import _pybind_state

    quantizer = getattr(_pybind_state, f"quantize_matmul_{bits}bits", None)
    if quantizer is None:
        pytest.skip(f"this ONNX Runtime has no quantizer of {bits} bits")
    weight = np.random.default_rng(0).standard_normal((48, 96)).astype(np.float32)
    integers = np.zeros((48, 3, BLOCK_SIZE * bits // 8), np.uint8)
    scales, zero_points = np.zeros(48 * 3, np.float32), np.zeros(48 * -(-3 * bits // 8), np.uint8)
    quantizer(integers, np.ascontiguousarray(weight.T), scales, zero_points, BLOCK_SIZE, 48, 96, True)
    rounded = round_blocks(weight, bits)
    np.testing.assert_array_equal(rounded.packed, integers)
    np.testing.assert_array_equal(rounded.scales.ravel(), scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_files_answer_like_the_weights_that_the_integers_stand_for(case: str, bits: int, tmp_path: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    path = exported(case, tmp_path, n_inner=72) if case == "gpt2" else exported(case, tmp_path, intermediate_size=72)
    model = onnx.load(path)
    nodes = linear_nodes(model)
    to_nbits_matmul(model, dict.fromkeys((node.name for node in nodes.values()), bits))
    made = linear_nodes(model)
    assert list(made) == list(nodes)
    assert {node.op_type for node in made.values()} == {"MatMulNBits"}
    target = tmp_path / "made.onnx"
    onnx.save(model, target)
    expected = onnx_runner(with_rounded_weights(path, bits))(BATCH)["logits"]
    found, unchanged = (onnx_runner(each)(BATCH)["logits"] for each in (target, path))
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected)
    assert error < 0.05 * np.linalg.norm(expected)  # activations have 8 bits, too
    if bits == 4:
        assert error < 0.3 * np.linalg.norm(unchanged - expected)


def test_a_tied_head_has_integers_of_its_own_and_the_embedding_stays(tmp_path: Path) -> None:
    path = exported("llama", tmp_path)
    model = onnx.load(path)
    before = constants(model.graph)["embedding.weight"]
    gemm = linear_nodes(model)[HEAD]
    assert gemm.op_type == "Gemm"
    to_nbits_matmul(model, {gemm.name: 8})
    after = constants(model.graph)
    np.testing.assert_array_equal(after["embedding.weight"], before)
    np.testing.assert_array_equal(after["/head/MatMul_quant.weight"], round_blocks(before, 8).packed)
    assert all(node.op_type == "MatMul" for name, node in linear_nodes(model).items() if name != HEAD)


@pytest.mark.parametrize("bits", [8, 4])
def test_metadata_say_what_the_file_needs(bits: int, tmp_path: Path) -> None:
    model = onnx.load(exported("llama", tmp_path))
    to_nbits_matmul(model, {linear_nodes(model)[HEAD].name: bits})
    metadata = {item.key: item.value for item in model.metadata_props}
    assert "GroupQueryAttention, MatMulNBits" in metadata["contrib_ops"]
    assert metadata["onnxruntime"] == (">=1.23" if bits == 8 else ">=1.20")
    assert metadata["form"] == "onnxruntime"


def test_what_cannot_be_weight_only_is_refused(tmp_path: Path) -> None:
    portable = onnx.load(exported("gpt2", tmp_path, "portable"))
    with pytest.raises(ExportError, match="portable form, found weight-only linears, which need MatMulNBits"):
        to_nbits_matmul(portable, {linear_nodes(portable)[HEAD].name: 8})
    model = onnx.load(exported("gpt2", tmp_path))
    untouched = model.SerializeToString()
    with pytest.raises(ExportError, match="'/nowhere/MatMul', which the graph does not have"):
        to_nbits_matmul(model, {"/nowhere/MatMul": 8})
    with pytest.raises(ExportError, match="8 or 4 bits a weight, found 3"):
        to_nbits_matmul(model, {linear_nodes(model)[HEAD].name: 3})
    with pytest.raises(ExportError, match="found another Gather; choose linears"):
        to_nbits_matmul(model, {"/embedding/Gather": 8})
    to_nbits_matmul(model, {})
    assert model.SerializeToString() == untouched


def test_a_bias_of_a_head_is_added_behind_it() -> None:
    generator = np.random.default_rng(0)
    weight, bias = (generator.standard_normal(shape).astype(np.float32) for shape in ((10, 40), (10,)))
    stored = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="/head/Gemm", transB=1)]
    x, y = (helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 40), ("y", 10)))
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored))
    to_nbits_matmul(model, {"/head/Gemm": 4})
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits", "Add"]
    assert model.graph.node[1].output[0] == "y"
    assert not model.metadata_props
    assert "com.microsoft" in {item.domain for item in model.opset_import}
