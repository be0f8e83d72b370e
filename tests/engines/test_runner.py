"""ONNX files as functions: the same answers in this process and in a worker."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.engines import WorkerHandle, runner
from ziplm_deploy.engines.runner import onnx_runner, open_runner
from ziplm_deploy.engines.session import cpu_session
from ziplm_deploy.errors import EngineError
from ziplm_deploy.recipe import Environment

INPUTS = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_inputs_that_a_graph_does_not_take_are_left_out(tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    path = write_mlp(tmp_path / "a.onnx", 32)
    expected = onnx_runner(path)(INPUTS)["output"]
    with open_runner(Environment(engine=engine), path) as run:
        found = run({**INPUTS, "token_type_ids": np.zeros((1, 3), np.int64)})
    assert list(found) == ["output"]
    np.testing.assert_allclose(found["output"], expected, atol=1e-5)


def test_a_session_is_of_a_file_or_of_a_serialized_model(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 32)
    of_file, of_bytes = (cpu_session(model).run(None, INPUTS)[0] for model in (path, path.read_bytes()))
    assert np.array_equal(of_file, of_bytes)


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"runs in .*broken\.onnx, found: .*export it again"):
        onnx_runner(path)
    with pytest.raises(EngineError, match="runs in memory"):
        cpu_session(b"no model")
    with pytest.raises(EngineError), open_runner(Environment(), path):
        pass


def test_answers_of_another_number_of_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    path = write_mlp(tmp_path / "a.onnx", 32)
    monkeypatch.setattr(WorkerHandle, "infer", lambda self, model, inputs: {"output": np.zeros((0, 32), np.float32)})
    said = r"expected 1 rows of output from openvino .*, found 0: .*benchmark\.baselines"
    with open_runner(Environment(engine="openvino"), path) as run, pytest.raises(EngineError, match=said):
        run(INPUTS)


def test_inputs_that_a_graph_needs_are_missed_by_name(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    said = r"expected inputs attention_mask, input_ids for .*, found no attention_mask"
    with (
        open_runner(Environment(engine="openvino"), write_mlp(tmp_path / "a.onnx", 32)) as run,
        pytest.raises(EngineError, match=said),
    ):
        run({"input_ids": INPUTS["input_ids"]})


def test_openvino_names_inputs_as_the_file_does(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    inputs = [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["batch", 3])]
    outputs = [onnx.helper.make_tensor_value_info("twice", onnx.TensorProto.FLOAT, ["batch", 3])]
    nodes = [  # compiling takes the first away, and leaves its name to the input
        onnx.helper.make_node("Cast", ["pixels"], ["cast"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Add", ["cast", "cast"], ["twice"]),
    ]
    graph = onnx.helper.make_graph(nodes, "cast", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "a.onnx")
    pixels = np.arange(6, dtype=np.float32).reshape(2, 3)
    with open_runner(Environment(engine="openvino"), tmp_path / "a.onnx") as run:
        np.testing.assert_array_equal(run({"pixels": pixels})["twice"], 2 * pixels)


def test_a_function_that_is_kept_keeps_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return inputs

    opened: list[weakref.ref[Session]] = []

    @contextlib.contextmanager
    def opening(environment: Environment, path: Path) -> Iterator[Session]:
        session = Session()
        opened.append(weakref.ref(session))
        yield session

    monkeypatch.setattr(runner, "open_runner", opening)
    with runner.open_when_asked(Environment(), tmp_path / "a.onnx") as ask:
        assert not opened
        assert ask(INPUTS) is INPUTS
        assert ask(INPUTS) is INPUTS
    gc.collect()
    assert [session() for session in opened] == [None]
    assert callable(ask)
