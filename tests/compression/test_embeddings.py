"""Embedding tables in 8 bits: which ones, how exact, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.int8_files import answer, constants, exported, int8
from tests.helpers.models import MODERN_TYPES, TEXT_TYPES, tiny_model
from ziplm_deploy.compression.int8.embeddings import has_rounded_embeddings, round_embeddings, round_embeddings_of
from ziplm_deploy.compression.int8.quantize import linear_names, quantized_linears
from ziplm_deploy.errors import CorruptArtifactError, NumericalError
from ziplm_deploy.recipe import EngineName, Int8Config

VOCABULARY = 24_000  # times 16 (ELECTRA) or 32 columns: worth rounding


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_word_embeddings_of_every_architecture_are_rounded_to_half_a_step(tmp_path: Path, model_type: str) -> None:
    source = exported(tmp_path, model=tiny_model(model_type, vocab_size=VOCABULARY))
    before = constants(onnx.load(str(source.path)).graph)
    name = next(name for name, value in before.items() if value.shape[:1] == (VOCABULARY,))
    expected = answer(source.path, source.batches[0])
    size = source.path.stat().st_size
    round_embeddings_of(source.path)
    after = constants(onnx.load(str(source.path)).graph)
    assert name not in after
    integers, scale = after[f"{name}_int8"], after[f"{name}_scale"]
    assert integers.dtype == np.int8
    assert np.abs(integers).max(axis=0).min() == 127  # every column uses its whole range
    assert (np.abs(integers * scale - before[name]) <= 0.5001 * scale).all()
    assert size - source.path.stat().st_size == pytest.approx(3 * before[name].size, rel=0.01)
    tolerance = 0.2 if model_type in MODERN_TYPES else 0.1  # random gates multiply the difference
    np.testing.assert_allclose(answer(source.path, source.batches[0]), expected, atol=tolerance)
    assert not np.array_equal(answer(source.path, source.batches[0]), expected)


def test_small_tables_stay_as_they_are(tmp_path: Path) -> None:
    source = exported(tmp_path)
    before = onnx.load(str(source.path))
    model = onnx.load(str(source.path))
    round_embeddings(model)
    assert model == before


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        (Int8Config(), "onnxruntime"),
        (Int8Config(method="static"), "onnxruntime"),
        (Int8Config(method="static"), "openvino"),
        (Int8Config(method="static", per_channel=False), "deepsparse"),
    ],
)
def test_int8_files_round_them_unless_told_not_to(tmp_path: Path, config: Int8Config, engine: EngineName) -> None:
    source = exported(tmp_path, model=tiny_model("bert", "text-classification", vocab_size=VOCABULARY))
    kept = int8(source, tmp_path / "kept.onnx", config.model_copy(update={"embeddings": False}), engine=engine)
    rounded = int8(source, tmp_path / "rounded.onnx", config, engine=engine)
    assert [has_rounded_embeddings(path) for path in (source.path, kept, rounded)] == [False, False, True]
    assert quantized_linears(rounded) == quantized_linears(kept) == linear_names(source.path)
    assert kept.stat().st_size - rounded.stat().st_size == pytest.approx(3 * VOCABULARY * 32, rel=0.01)
    np.testing.assert_allclose(answer(rounded, source.batches[0]), answer(kept, source.batches[0]), atol=0.05)


def graph_of(table: np.ndarray, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [4])]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", "m"])]
    graph = helper.make_graph(nodes, "lookup", inputs, outputs, [numpy_helper.from_array(table, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


def table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((VOCABULARY, 32)).astype(np.float32)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Gather", ["table", "ids"], ["out"], axis=1)],
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Transpose", ["table"], ["tied"]),
            helper.make_node("MatMul", ["rows", "tied"], ["out"]),
        ],
    ],
    ids=["lookup of columns", "tied weights"],
)
def test_tables_that_are_not_only_looked_up_stay(nodes: list[onnx.NodeProto]) -> None:
    model = graph_of(table(), nodes)
    before = onnx.ModelProto.FromString(model.SerializeToString())
    round_embeddings(model)
    assert model == before


def test_positions_of_a_large_model_stay() -> None:
    positions = np.random.default_rng(0).standard_normal((512, 768)).astype(np.float32)
    model = graph_of(positions, [helper.make_node("Gather", ["table", "ids"], ["out"])])
    before = onnx.ModelProto.FromString(model.SerializeToString())
    round_embeddings(model)
    assert model == before


def test_a_column_of_zeros_stays_zero_and_two_lookups_share_a_table(tmp_path: Path) -> None:
    values = table()
    values[:, 3] = 0.0
    model = graph_of(
        values,
        [
            helper.make_node("Gather", ["table", "ids"], ["left"], name="left"),
            helper.make_node("Gather", ["table", "ids"], ["right"], name="right", axis=0),
            helper.make_node("Add", ["left", "right"], ["out"]),
        ],
    )
    round_embeddings(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(tmp_path / "model.onnx"))
    ids = np.array([0, 1, 7, VOCABULARY - 1])
    found = answer(tmp_path / "model.onnx", {"ids": ids})
    assert (found[:, 3] == 0).all()
    np.testing.assert_allclose(found, 2 * values[ids], atol=0.05)
    assert sum(item.data_type == TensorProto.INT8 for item in model.graph.initializer) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_that_are_not_finite_are_refused_and_the_file_stays(tmp_path: Path, value: float) -> None:
    values = table()
    values[5, 5] = value
    path = tmp_path / "model.onnx"
    onnx.save(graph_of(values, [helper.make_node("Gather", ["table", "ids"], ["out"])]), str(path))
    before = path.read_bytes()
    with pytest.raises(NumericalError, match="table"):
        round_embeddings_of(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CorruptArtifactError, match="export it again"):
        round_embeddings_of(tmp_path / "model.onnx")
