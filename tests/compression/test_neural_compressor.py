"""neural-compressor as a back end: the protocol with stand-ins for its worker, and the real one where it is set up."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import to_integer_matmul
from exporters.names import linear_of
from tests.helpers.models import tiny_model
from tests.helpers.neural_compressor_files import (
    DYNAMIC,
    N_LINEARS,
    answers,
    export,
    make_batches,
    partly_zero,
    run,
)
from ziplm_deploy.compression.int8 import neural_compressor_worker
from ziplm_deploy.compression.int8.neural_compressor import NeuralCompressorResult, TuningLimits
from ziplm_deploy.compression.int8.quantize import linear_names, linear_ranges, quantized_linears
from ziplm_deploy.errors import CorruptArtifactError, DataError, EngineError, NumericalError, UsageError
from ziplm_deploy.machine.side_environments import NEURAL_COMPRESSOR
from ziplm_deploy.recipe import Int8Config

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text("{}", encoding="utf-8")  # as in a member's folder
    return partly_zero(folder / "model.onnx")


def left_in(temporary: Path) -> list[Path]:
    """What is in a folder for temporary files, but for this process's own scratch folder, which has to be empty."""
    [own] = temporary.glob("ziplm-deploy-*/process-*")
    assert [path.name for path in own.iterdir()] == [".lock"]
    return [path for path in temporary.iterdir() if path != own.parent]


# --- the protocol, with stand-ins for the worker ---


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run Python code instead of the worker; it has ``request``, ``say`` and ``hear``."""

    def install(code: str) -> None:
        script = tmp_path / "pretended.py"
        script.write_text(
            "import json, os, pathlib, sys, time\n"
            "request = json.load(open(sys.argv[2]))\n"
            "say = lambda **reply: print(json.dumps(reply), flush=True)\n"
            "hear = lambda: json.loads(sys.stdin.readline())\n"
            "done = dict(ok=True, scores=[], fp32_nodes=[], met=None)\n"
            "write = lambda: pathlib.Path(request['target']).write_bytes(b'int8')\n" + code,
            encoding="utf-8",
        )
        interpreter = tmp_path / "python"
        interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n', encoding="utf-8")
        interpreter.chmod(0o755)
        monkeypatch.setenv(NEURAL_COMPRESSOR.variable, str(interpreter))

    return install


def test_the_request_says_everything(source: Path, tmp_path: Path, temporary: Path, pretend: Any) -> None:
    pretend(f"pathlib.Path({str(tmp_path / 'seen.json')!r}).write_text(json.dumps(request)); write(); say(**done)")
    config = Int8Config(method="static", ranges="percentile", percentile=99.5, per_channel=False, max_loss=0.02)
    result = run(source, tmp_path / "int8.onnx", config, limits=TuningLimits(max_trials=7, tuning_seconds=60.0))
    request = neural_compressor_worker.Request(**json.loads((tmp_path / "seen.json").read_text()))
    assert result == NeuralCompressorResult(scores=(), fp32_linears=(), met=None)
    assert (tmp_path / "int8.onnx").read_bytes() == b"int8"
    ranges = linear_ranges(source, make_batches(), config)
    given = {linear_of(node): tuple(values) for node, values in request.ranges.items()}
    assert given == {name: (values.low, values.high) for name, values in ranges.items()}
    assert request.approach == "static"
    assert (request.per_channel, request.reduce_range, request.tune) == (False, True, False)
    assert (request.max_loss, request.max_fp32_share, request.max_trials) == (0.02, 0.5, 7)
    assert len(request.nodes) == N_LINEARS
    assert all(("/layer." in name and name.endswith("/dense/MatMul")) or "/self/" in name for name in request.nodes)
    assert not {name for name in request.nodes if name.endswith("self/MatMul")}  # a product of two activations
    assert not left_in(temporary)  # nothing is left behind


def test_scores_are_asked_for_and_reported(source: Path, tmp_path: Path, pretend: Any) -> None:
    pretend(
        "say(evaluate=request['source']); first = hear()['score']\n"
        "say(evaluate='/a/candidate.onnx'); second = hear()['score']\n"
        "write(); say(ok=True, scores=[second], fp32_nodes=request['nodes'][:2], met=second >= first)"
    )
    asked: list[Path] = []

    def evaluate(path: Path) -> float:
        asked.append(path)
        return 0.75 + len(asked)

    result = run(source, tmp_path / "int8.onnx", evaluate=evaluate)
    assert [path.name for path in asked] == ["model.onnx", "candidate.onnx"]
    assert (result.scores, result.met) == ((2.75,), True)
    assert result.fp32_linears == linear_names(source)[:2]


FAILURES = {
    "say(ok=False, error='RuntimeError: no such operator')": "RuntimeError: no such operator",
    "print('so far so good', file=sys.stderr); sys.exit(3)": r"the process died \(exit code 3\).*so far so good",
    "os.abort()": r"the process died \(signal SIGABRT\)",
    "print('half', flush=True)": "half a reply",
    "say(evaluate='x')": "{'evaluate': 'x'}",  # nobody offered to score anything
    "time.sleep(60)": "no answer within 1 s",
}


@pytest.mark.parametrize("code", FAILURES)
def test_failures_of_the_worker_say_how_to_reproduce(
    source: Path, tmp_path: Path, temporary: Path, pretend: Any, code: str
) -> None:
    pretend("write(); " + code)
    target = tmp_path / "int8.onnx"
    with pytest.raises(EngineError, match="(?s)" + FAILURES[code]) as caught:
        run(source, target, limits=TuningLimits(timeout_seconds=1.0 if "sleep" in code else 60.0))
    assert not target.exists()
    [folder] = left_in(temporary)
    assert f"cd {folder} && " in str(caught.value)
    assert "neural_compressor_worker.py request.json" in str(caught.value)
    left = {path.name for path in folder.iterdir()}
    assert left == {"request.json", "log.txt", "source"}


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_must_be_finite(source: Path, tmp_path: Path, temporary: Path, pretend: Any, score: float) -> None:
    pretend("say(evaluate=request['source']); hear()")
    with pytest.raises(NumericalError, match=r"expected a finite score of model\.onnx"):
        run(source, tmp_path / "int8.onnx", evaluate=lambda path: score)
    assert not left_in(temporary)


def test_errors_of_the_score_end_the_worker(source: Path, tmp_path: Path, temporary: Path, pretend: Any) -> None:
    pid = tmp_path / "pid"
    pretend(f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); say(evaluate=request['source']); hear()")

    def evaluate(path: Path) -> float:
        raise DataError("no rows")

    with pytest.raises(DataError, match="no rows"):
        run(source, tmp_path / "int8.onnx", evaluate=evaluate)
    assert not Path(f"/proc/{pid.read_text()}").exists()
    assert not left_in(temporary)


def test_what_cannot_be_quantized_is_refused_before_anything_runs(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    with pytest.raises(UsageError, match="found qat"):
        run(source, target, Int8Config(method="qat"))
    with pytest.raises(CorruptArtifactError, match="expected an ONNX file"):
        run(tmp_path / "missing.onnx", target)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "no linears",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "relu.onnx"))
    with pytest.raises(UsageError, match="expected float32 linears inside numbered layers"):
        run(tmp_path / "relu.onnx", target)


def test_weights_must_be_finite(tmp_path: Path) -> None:
    model = tiny_model("bert", "text-classification")
    weight = model.get_parameter("bert.encoder.layer.1.output.dense.weight")
    weight.data[0, 0] = math.nan
    path = export(tmp_path / "nan.onnx", model)
    with pytest.raises(NumericalError, match=r"weights of .*layer\.1\.output\.dense, found NaN"):
        run(path, tmp_path / "int8.onnx", ranges={})


def test_static_needs_the_range_of_every_linear(source: Path, tmp_path: Path, pretend: Any) -> None:
    pretend("")
    ranges = linear_ranges(source, make_batches(), Int8Config())
    last = linear_names(source)[-1]
    for given in (None, {name: values for name, values in ranges.items() if name != last}):
        with pytest.raises(UsageError, match=r"expected a range for bert.*, found none"):
            run(source, tmp_path / "int8.onnx", ranges=given)


def test_without_a_set_up_the_command_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NEURAL_COMPRESSOR.variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EngineError, match="run: ziplm-deploy setup neural-compressor"):
        run(source, tmp_path / "int8.onnx")


# --- the real one ---


PER_TENSOR = Int8Config(method="static", per_channel=False)
PERCENTILE = Int8Config(method="static", ranges="percentile", percentile=99.0)


@pytest.fixture(scope="module")
def ready() -> None:
    try:
        NEURAL_COMPRESSOR.version()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def static_files(ready: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Int8Config, Path]:
    folder = tmp_path_factory.mktemp("static")
    files = {PER_TENSOR: folder / "minmax.onnx", PERCENTILE: folder / "percentile.onnx"}
    for config, path in files.items():
        result = run(source, path, config)
        assert result == NeuralCompressorResult(scores=(), fp32_linears=(), met=None)
    return files


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def constants(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("config", [PER_TENSOR, PERCENTILE], ids=["minmax", "percentile"])
def test_static_files_hold_the_calibrated_ranges(
    source: Path, static_files: dict[Int8Config, Path], config: Int8Config
) -> None:
    target = static_files[config]
    assert quantized_linears(target) == linear_names(source)
    graph, values = onnx.load(str(target)).graph, constants(target)
    made_by = {node.output[0]: node for node in graph.node}
    ranges = linear_ranges(source, make_batches(), config)
    dense = constants(source)
    originals = {
        node.name: dense[node.input[1]]
        for node in onnx.load(str(source)).graph.node
        if node.op_type == "MatMul" and node.input[1] in dense
    }
    for node in graph.node:
        if node.name not in originals:
            continue
        name = next(name for name in ranges if node.name.replace("/", ".").endswith(f".{name}.MatMul"))
        activation, weight = (made_by[tensor] for tensor in node.input)
        width = max(ranges[name].high, 0.0) - min(ranges[name].low, 0.0)
        assert values[activation.input[1]] == pytest.approx(width / 255, rel=1e-5)
        stored, scale = values[weight.input[0]], values[weight.input[1]]
        assert stored.dtype == np.int8
        assert np.abs(stored).max() == (64 if originals[node.name].any() else 0)  # reduce_range
        assert scale.size == (stored.shape[1] if config.per_channel else 1)
        assert np.abs(stored * scale - originals[node.name]).max() <= 0.51 * scale.max()
    dequantized = {name for name, node in made_by.items() if node.op_type == "DequantizeLinear"}
    assert all(node.op_type == "MatMul" for node in graph.node if dequantized.intersection(node.input))


def test_static_files_leave_the_rest_of_the_graph_alone(
    source: Path, static_files: dict[Int8Config, Path], tmp_path: Path
) -> None:
    target, integers = static_files[PER_TENSOR], tmp_path / "integers.onnx"
    kept, before = operators(target), operators(source)
    del kept["QuantizeLinear"], kept["DequantizeLinear"], before["Constant"]  # which become initializers
    assert kept == before
    model, dense = onnx.load(str(target)), onnx.load(str(source))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 16)]
    assert model.ir_version == dense.ir_version
    batch = make_batches()[0]
    expected, found = answers(source, batch), answers(target, batch)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert not np.array_equal(found, expected)
    to_integer_matmul(target, integers)  # the form that DeepSparse runs
    np.testing.assert_allclose(answers(integers, batch), found, atol=1e-3)


@pytest.mark.usefixtures("ready")
def test_dynamic_tuning_falls_back_until_the_score_holds(source: Path, tmp_path: Path) -> None:
    target, counts = tmp_path / "int8.onnx", []

    def evaluate(path: Path) -> float:
        """Accepts what has few quantized linears; more of them lose more."""
        counts.append(len(quantized_linears(path)))
        answers(path, make_batches()[0])
        return 1.0 if counts[-1] <= 14 else 0.9 - 0.01 * counts[-1]

    result = run(source, target, DYNAMIC, evaluate=evaluate)
    assert counts[:2] == [0, N_LINEARS]  # the source, then everything quantized
    assert result.met is True
    assert result.scores[-1] == 1.0
    assert len(result.scores) == len(counts) - 1
    assert len(quantized_linears(target)) == counts[-1] <= 14
    assert set(result.fp32_linears) == set(linear_names(source)) - set(quantized_linears(target))
    assert operators(target)["MatMulInteger"] == counts[-1]
    batch = make_batches()[0]
    expected = answers(source, batch)
    assert np.abs(answers(target, batch) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.usefixtures("ready")
def test_a_budget_that_nothing_holds_is_reported(source: Path, tmp_path: Path, temporary: Path) -> None:
    def evaluate(path: Path) -> float:
        n = len(quantized_linears(path))
        return 1.0 if not n else 0.5 - 0.01 * n

    target = tmp_path / "int8.onnx"
    config = Int8Config(method="static", max_fp32_share=0.2)
    result = run(source, target, config, evaluate=evaluate, limits=TuningLimits(max_trials=12))
    assert result.met is False
    assert not left_in(temporary)
    assert max(result.scores) == pytest.approx(0.5 - 0.01 * len(quantized_linears(target)))
    assert 0 < len(result.fp32_linears) <= 0.2 * N_LINEARS
