"""The parts of neural-compressor's worker that need no neural-compressor: tuning, and cleaning its graphs."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.neural_compressor_files import partly_zero
from ziplm_deploy.compression.int8 import neural_compressor_worker

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return partly_zero(tmp_path_factory.mktemp("source") / "model.onnx")


def request(**changes: Any) -> neural_compressor_worker.Request:
    fields: dict[str, Any] = {"source": "s.onnx", "target": "t.onnx", "nodes": ("a", "b", "c", "d")}
    fields |= {"approach": "static", "ranges": {}, "per_channel": True}
    fields |= {"reduce_range": False, "tune": True, "max_loss": 0.1, "max_fp32_share": 0.5, "max_trials": 9}
    return neural_compressor_worker.Request(**{**fields, "tuning_seconds": 60.0, **changes})


def candidate(float32: str) -> onnx.ModelProto:
    """A model in which the named MatMuls of ``abcd`` are float32."""
    nodes = [helper.make_node("MatMul", ["x", "w"], [n], name=n if n in float32 else f"{n}_quant") for n in "abcd"]
    return helper.make_model(helper.make_graph(nodes, "g", [], []))


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tuning with given answers: baseline first; ``asked`` are the paths that it sent."""

    def start(*scores: float, **changes: Any) -> tuple[neural_compressor_worker.Tuning, io.StringIO]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps({"score": s}) + "\n" for s in scores)))
        replies = io.StringIO()
        return neural_compressor_worker.Tuning(request(**changes), replies), replies

    return start


def test_the_best_candidate_is_kept(tuning: Any) -> None:
    running, replies = tuning(1.0, 0.5, 0.7, 0.6)
    assert running.score(candidate("abcd")) == 1.0  # the baseline is not asked for again
    assert [running.score(candidate(left)) for left in ("", "a", "ab")] == [0.5, 0.7, 0.6]
    assert running.best == (False, 0.7, -1)
    assert running.best_fp32 == ["a"]
    assert neural_compressor_worker.float32_nodes(onnx.load(str(running.best_path)), ("a", "b")) == [
        "a",
        "b",
    ]  # names as before
    assert replies.getvalue().count("candidate.onnx") == 3


def test_a_candidate_within_the_budget_beats_all_others(tuning: Any) -> None:
    running, _ = tuning(-1.0, -1.2, -1.1)  # 10 % of -1 is 0.1: also where scores are negative
    running.score(candidate(""))
    running.score(candidate("ab"))
    assert running.best == (True, -1.1, -2)


def test_a_candidate_is_scored_once(tuning: Any) -> None:
    running, replies = tuning(1.0, 0.5)
    assert running.score(candidate("a")) == running.score(candidate("a")) == 0.5
    assert len(replies.getvalue().splitlines()) == 2


def test_too_much_float32_is_not_scored(tuning: Any) -> None:
    running, replies = tuning(1.0)
    assert running.score(candidate("abc")) == -math.inf
    assert running.best is None
    assert len(replies.getvalue().splitlines()) == 1


def test_tuning_ends_in_time_but_not_without_a_candidate(tuning: Any) -> None:
    running, _ = tuning(1.0, 0.5, 0.6, tuning_seconds=0.0)
    time.sleep(0.01)
    assert running.score(candidate("")) == 0.5
    with pytest.raises(neural_compressor_worker.TuningEndedError):
        running.score(candidate("a"))


def test_a_lost_parent_is_an_error(tuning: Any) -> None:
    with pytest.raises(EOFError):
        tuning()


def test_exceptions_that_are_only_logged_are_found() -> None:
    handler = neural_compressor_worker.Errors()
    for message in (
        "Specified timeout or max trials is reached!",
        "Unexpected exception TuningEndedError() happened during tuning.",
        "Unexpected exception ValueError('x') happened during tuning.",
    ):
        handler.handle(logging.makeLogRecord({"msg": message, "levelno": logging.ERROR}))
    assert handler.found == ["Unexpected exception ValueError('x') happened during tuning."]


def rounded_residual() -> onnx.ModelProto:
    """``y = x·w + b + x`` as neural-compressor writes it: the residual reads the 8-bit form, too."""
    scale, zero_point = (numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.uint8(100), "z"))
    weight = numpy_helper.from_array(np.eye(4, dtype=np.int8), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "one"], ["dw"]),
        helper.make_node("MatMul", ["d", "dw"], ["m"], name="/layer.0/dense/MatMul_quant"),
        helper.make_node("Add", ["b", "m"], ["a"], name="/layer.0/dense/Add"),
        helper.make_node("Add", ["a", "d"], ["y"], name="/layer.0/Add"),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4])],
        [
            *(scale, zero_point, weight, numpy_helper.from_array(np.float32(1), "one")),
            numpy_helper.from_array(np.arange(4, dtype=np.float32), "b"),
        ],
    )
    sets = [helper.make_opsetid(name, 1) for name in ("com.microsoft", "ai.onnx.ml", "org.pytorch.aten")]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16), *sets], ir_version=8)


def test_cleaning_keeps_the_residual_exact_and_other_engines_happy() -> None:
    model = rounded_residual()
    before = model.SerializeToString()
    cleaned = neural_compressor_worker.cleaned(model)
    assert model.SerializeToString() == before
    assert [(entry.domain, entry.version) for entry in cleaned.opset_import] == [("", 16)]
    assert [node.name for node in cleaned.graph.node if node.op_type == "MatMul"] == ["/layer.0/dense/MatMul"]
    x = np.random.default_rng(0).standard_normal((1, 2, 4), dtype=np.float32)
    integers = np.clip(np.round(x / np.float32(0.05)) + 100, 0, 255)
    expected = np.float32(0.05) * (integers - 100) + np.arange(4) + x
    [found] = onnxruntime.InferenceSession(cleaned.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-6)
    bias = next(item for item in cleaned.graph.initializer if item.name.endswith("Add_bias"))
    assert list(bias.dims) == [1, 1, 4]
    assert "b" not in {item.name for item in cleaned.graph.initializer}


def test_cleaning_keeps_operator_sets_that_are_used() -> None:
    model = rounded_residual()
    model.graph.node.append(helper.make_node("Gelu", ["x"], ["unused"], domain="com.microsoft"))
    assert {entry.domain for entry in neural_compressor_worker.cleaned(model).opset_import} == {"", "com.microsoft"}
