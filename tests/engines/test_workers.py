"""Worker processes: right answers, sane timings, and every way in which a worker can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper

import ziplm_deploy.engines.base as base
from tests.helpers.onnx_models import write, write_identity, write_int8, write_mlp
from ziplm_deploy.engines import ENGINES, WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.engines.worker import deepsparse_session, onnxruntime_session, openvino_session
from ziplm_deploy.engines.worker.inputs import make_inputs
from ziplm_deploy.engines.worker.protocol import parse
from ziplm_deploy.errors import EngineError, EnvironmentMismatchError

TINY = WorkerOptions(batch_size=2, seq_len=16)


def start(options: WorkerOptions = TINY) -> WorkerHandle:
    return get_engine("onnxruntime").start_worker(options)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_registry_and_unknown_engine() -> None:
    assert ENGINES == ("deepsparse", "llamacpp", "onnxruntime", "openvino")
    assert get_engine("onnxruntime").version()
    with pytest.raises(EngineError, match="deepsparse, llamacpp, onnxruntime, openvino, found 'tensorrt'"):
        get_engine("tensorrt")


def test_load_time_infer_unload(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 32)
    with start() as worker:
        signature = worker.load("a", path)
        assert [tensor.name for tensor in signature.inputs] == ["input_ids", "attention_mask"]
        assert signature.inputs[0].shape == ("batch", "tokens")
        assert signature.outputs[0].type == "tensor(float)"
        assert len(worker.time("a", n=4)) == 4
        ids = np.array([[1, 2, 3]])
        outputs = worker.infer("a", {"input_ids": ids, "attention_mask": np.array([[1, 1, 0]])})
        assert outputs["output"].shape == (1, 3, 64)
        assert np.all(outputs["output"][0, 2] == 0)
        assert np.any(outputs["output"][0, 1] != 0)
        assert worker.peak_memory_bytes() > 2**20
        assert worker.version == get_engine("onnxruntime").version()
        worker.unload("a")
        with pytest.raises(EngineError, match="KeyError"):
            worker.time("a", n=1)


def test_interleaved_timing_tells_large_from_small(tmp_path: Path) -> None:
    options = WorkerOptions(batch_size=4, seq_len=64, shared_arena=True)
    with start(options) as worker:
        for name, width in (("small", 8), ("large", 8192)):
            worker.load(name, write_mlp(tmp_path / f"{name}.onnx", width))
        times_ms = worker.time_many([("small", 0), ("large", 0)] * 5)
        assert len(times_ms) == 10
        assert np.median(times_ms[1::2]) > 3 * np.median(times_ms[::2]) > 0


def test_shared_arena_gives_the_same_answers(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 16)
    inputs = {"input_ids": np.array([[3, 4]]), "attention_mask": np.array([[1, 1]])}
    answers = []
    for shared in (False, True):
        with start(WorkerOptions(shared_arena=shared)) as worker:
            worker.load("a", path)
            worker.load("b", path)
            answers += [worker.infer(name, inputs)["output"] for name in ("a", "b")]
    assert all(np.array_equal(answers[0], answer) for answer in answers)


def made_input(path: Path, batch_size: int = 2, seq_len: int = 8) -> np.ndarray:
    metadata = onnxruntime_session.Sessions(parse([])).load(str(path)).get_inputs()
    (array,) = make_inputs(metadata, batch_size, seq_len).values()
    return array


@pytest.mark.parametrize(
    ("name", "element_type", "shape", "expected_shape", "low", "high"),
    [
        ("input_ids", TensorProto.INT64, ["b", "s"], (2, 8), 4, 23),
        ("input_ids", TensorProto.INT32, [None, None], (2, 8), 4, 23),
        ("attention_mask", TensorProto.INT64, ["b", 8], (2, 8), 1, 1),
        ("attention_mask", TensorProto.FLOAT, ["b", "s"], (2, 8), 1, 1),
        ("token_type_ids", TensorProto.INT64, [2, "s"], (2, 8), 0, 0),
        ("position_ids", TensorProto.INT64, ["b", "s"], (2, 8), 0, 7),
        ("use_cache", TensorProto.BOOL, [1], (1,), 1, 1),
        ("pixel_values", TensorProto.FLOAT, ["b", 3, 16, 16], (2, 3, 16, 16), -6, 6),
        ("pixel_values", TensorProto.FLOAT, ["b", "num_channels", "height", "width"], (2, 3, 224, 224), -7, 7),
        ("features", TensorProto.FLOAT, ["b", 5], (2, 5), -6, 6),
        ("hidden", TensorProto.FLOAT16, ["b", "s", 12], (2, 8, 12), -6, 6),
    ],
)
def test_inputs_are_made_from_metadata(
    tmp_path: Path,
    name: str,
    element_type: int,
    shape: list[int | str | None],
    expected_shape: tuple[int, ...],
    low: float,
    high: float,
) -> None:
    if shape == [1]:  # a flag has no batch axis that must agree
        array = made_input(write_identity(tmp_path / "m.onnx", element_type, shape, name), batch_size=1)
    else:
        array = made_input(write_identity(tmp_path / "m.onnx", element_type, shape, name))
    assert array.shape == expected_shape
    assert low <= array.min() <= array.max() <= high


def test_fixed_shapes_that_contradict_the_environment_are_refused(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "static.onnx", 8, batch=1, tokens=32)
    with start() as worker, pytest.raises(EngineError, match=r"fixed shape \[1, 32\].*batch size 2 and 16 tokens"):
        worker.load("static", path)


def test_unknown_input_type_is_refused(tmp_path: Path) -> None:
    path = write_identity(tmp_path / "text.onnx", TensorProto.STRING, ["b"])
    with start() as worker, pytest.raises(EngineError, match=r"tensor\(string\)"):
        worker.load("text", path)


def test_short_models_are_warmed_up_by_time(tmp_path: Path) -> None:
    with start() as worker:
        worker.load("a", write_mlp(tmp_path / "a.onnx", 8))
        for warmup_ms, least_s in ((300.0, 0.3), (0.0, 0.0)):
            began = time.monotonic()
            assert len(worker.time("a", n=2, warmup=1, warmup_ms=warmup_ms)) == 2
            assert least_s <= time.monotonic() - began < least_s + 0.25  # a run takes microseconds


def test_rejected_models_leave_the_worker_usable(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"this is not a protobuf")
    truncated = write_mlp(tmp_path / "truncated.onnx", 64)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    unknown = write(
        tmp_path / "unknown.onnx",
        [helper.make_node("NoSuchOperator", ["x"], ["output"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])],
        {},
    )
    with start() as worker:
        for path in (garbage, truncated, unknown):
            with pytest.raises(EngineError, match=rf"(?s){path.name}.*reproduce with: .*--probe") as caught:
                worker.load("bad", path)
            assert str(worker.options.seq_len) in str(caught.value)
        with pytest.raises(EngineError, match="found none"):
            worker.load("absent", tmp_path / "absent.onnx")
        worker.load("good", write_mlp(tmp_path / "good.onnx", 8))
        assert worker.time("good", n=1)


def test_wrong_inputs_are_an_engine_error(tmp_path: Path) -> None:
    with start() as worker:
        worker.load("a", write_mlp(tmp_path / "a.onnx", 8))
        with pytest.raises(EngineError, match=r"infer .*a\.onnx"):
            worker.infer("a", {"input_ids": np.array([[1]])})


def test_reproduction_command_works(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 8)
    good = subprocess.run([sys.executable, str(base.WORKER), "--probe", str(path)], capture_output=True, text=True)
    assert good.returncode == 0
    assert len(json.loads(good.stdout.splitlines()[1])["ms"]) == 5
    path.write_bytes(b"broken")
    assert subprocess.run([sys.executable, str(base.WORKER), "--probe", str(path)], capture_output=True).returncode == 1


def test_killed_worker_names_model_and_signal(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "victim.onnx", 8)
    with start() as worker:
        worker.load("a", path)
        os.kill(worker._process.pid, signal.SIGABRT)
        with pytest.raises(EngineError, match=r"(?s)victim\.onnx.*SIGABRT.*reproduce with"):
            worker.time("a", n=1)


def test_a_worker_that_dies_over_several_models_names_the_one(tmp_path: Path) -> None:
    paths = {name: write_mlp(tmp_path / f"{name}.onnx", 8) for name in ("first", "second")}
    with start() as worker:
        for name, path in paths.items():
            worker.load(name, path)
        worker.time_many([("first", 0), ("second", 0)])
        threading.Timer(0.5, os.kill, (worker._process.pid, signal.SIGKILL)).start()
        with pytest.raises(EngineError, match=r"(?s)to run \S*second\.onnx.*SIGKILL.*--probe \S*second\.onnx"):
            worker.time_many([("first", 0), *[("second", 0)] * 200_000])


def test_a_closed_worker_says_so() -> None:
    worker = start()
    worker.close()
    with pytest.raises(EngineError, match=r"ended before \(exit code 0\)"):
        worker.peak_memory_bytes()


def test_hung_worker_is_killed_after_the_timeout(tmp_path: Path) -> None:
    with start(WorkerOptions(timeout_seconds=20.0)) as worker:
        worker.load("a", write_mlp(tmp_path / "slow.onnx", 8))
        os.kill(worker._process.pid, signal.SIGSTOP)
        worker.options = WorkerOptions(timeout_seconds=0.3)
        with pytest.raises(EngineError, match=r"slow\.onnx.*no answer within 0\.3 s"):
            worker.time("a", n=1)
        assert not worker._process.running()


def test_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'no module named engine' >&2\nexit 3\n")
    fake.chmod(0o755)
    said = r"(?s)exit code 3.*no module named engine"
    with pytest.raises(EngineError, match=said):
        WorkerHandle("onnxruntime", str(fake), TINY).wait_until_ready()
    with pytest.raises(EngineError, match=said):
        WorkerHandle("onnxruntime", str(fake), TINY).load("a", write_mlp(tmp_path / "a.onnx", 8))


def test_missing_interpreter_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="interpreter"):
        WorkerHandle("onnxruntime", str(tmp_path / "nowhere"), TINY)


def test_too_many_threads_are_refused_before_a_process_starts() -> None:
    with pytest.raises(EnvironmentMismatchError, match="threads=4000"):
        start(WorkerOptions(threads=4000))


def test_ctrl_c_ends_the_worker_at_once() -> None:
    handle = start()
    with pytest.raises(KeyboardInterrupt), handle:
        raise KeyboardInterrupt
    assert not alive(handle._process.pid)
    handle.close()  # twice is fine


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = (
        "import sys, os; from ziplm_deploy.engines import get_engine, WorkerOptions\n"
        "worker = get_engine('onnxruntime').start_worker(WorkerOptions())\n"
        "print(worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else sys.exit(0)\n"
    )
    for how in ("exit", "kill"):
        parent = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True)
        pid = int(parent.stdout)
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid), how


def test_openvino_answers_like_onnx_runtime_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    path = write_mlp(tmp_path / "a.onnx", 32)
    inputs = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}
    outputs, signatures = {}, {}
    for name in ("onnxruntime", "openvino"):
        with get_engine(name).start_worker(TINY) as worker:
            signatures[name] = worker.load("a", path)
            outputs[name] = worker.infer("a", inputs)["output"]
            assert len(worker.time("a", n=3)) == 3
            assert worker.version == get_engine(name).version()
    np.testing.assert_allclose(outputs["openvino"], outputs["onnxruntime"], atol=1e-5)
    one, other = ([(entry.name, entry.type) for entry in found.inputs] for found in signatures.values())
    assert one == other
    assert signatures["openvino"].inputs[0].shape == (None, None)


def test_openvino_sends_no_telemetry_and_leaves_no_process_behind(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    with get_engine("openvino").start_worker(TINY) as worker:
        worker.load("a", write_mlp(tmp_path / "a.onnx", 32))
        worker.time("a", n=1)
        pid = worker._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if not children.exists():
            pytest.skip("this system does not list child processes")
        assert children.read_text(encoding="ascii").split() == []


def test_openvino_rejects_what_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with get_engine("openvino").start_worker(TINY) as worker, pytest.raises(EngineError, match=r"broken\.onnx"):
        worker.load("a", tmp_path / "broken.onnx")


def test_openvino_runs_integers_as_integers_though_floats_are_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    engine = openvino_session.Sessions(parse(["--engine", "openvino"]))
    kernels: dict[str, list[str]] = {}
    for name, path in (("int8", write_int8(tmp_path / "q.onnx")), ("fp32", write_mlp(tmp_path / "f.onnx", 64))):
        compiled = engine.core.compile_model(engine.core.read_model(str(path)), "CPU", engine.settings)
        compiled.create_infer_request().infer(make_inputs(engine.load(str(path)).get_inputs(), 1, 8))
        layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        products = [layer for layer in layers if layer["layerType"].value == "FullyConnected"]
        kernels[name] = [layer["primitiveType"].value for layer in products]
    assert len(kernels["int8"]) == len(kernels["fp32"]) == 2
    assert all(kernel.endswith("_I8") for kernel in kernels["int8"])
    assert not any(kernel.endswith("_I8") for kernel in kernels["fp32"])


def fake_deepsparse(monkeypatch: pytest.MonkeyPatch) -> deepsparse_session.Sessions:
    """The adapter without the engine: what it refuses must not reach the engine."""
    import importlib.metadata

    def never(**options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setitem(sys.modules, "deepsparse", SimpleNamespace(Engine=never))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.8.0")
    monkeypatch.setenv("NM_DISABLE_ANALYTICS", "1")
    return deepsparse_session.Sessions(parse(["--engine", "deepsparse", "--batch-size", "2", "--seq-len", "16"]))


def test_deepsparse_refuses_what_it_would_run_in_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_deepsparse(monkeypatch)
    static = {"batch": 2, "tokens": 16}
    cases = {
        r"dynamic axes: input_ids \['batch', 'tokens'\].*export with static shapes of batch size 2 and 16 tokens": (
            write_mlp(tmp_path / "dynamic.onnx", 8, opset=16)
        ),
        r"opset 17; .*slow fallback: export with opset 16": write_mlp(tmp_path / "new.onnx", 8, **static),
        r"fixed shape \[2, 8\].*batch size 2 and 16 tokens": (
            write_mlp(tmp_path / "short.onnx", 8, batch=2, tokens=8, opset=16)
        ),
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            engine.load(str(path))
    with pytest.raises(AssertionError, match="compiled"):
        engine.load(str(write_mlp(tmp_path / "good.onnx", 8, opset=16, **static)))


def test_deepsparse_answers_like_onnx_runtime_and_refuses_in_words(tmp_path: Path) -> None:
    try:
        version = get_engine("deepsparse").version()
    except EngineError as missing:
        pytest.skip(str(missing))
    path = write_mlp(tmp_path / "a.onnx", 32, batch=2, tokens=16, opset=16)
    ids = np.arange(32).reshape(2, 16) % 20
    inputs = {"input_ids": ids, "attention_mask": (ids > 3).astype(np.int64)}
    outputs = {}
    for name in ("onnxruntime", "deepsparse"):
        with get_engine(name).start_worker(TINY) as worker:
            worker.load("a", path)
            outputs[name] = worker.infer("a", inputs)["output"]
            assert len(worker.time("a", n=3)) == 3
            if name == "deepsparse":
                assert worker.version == version
                with pytest.raises(EngineError, match=r"dynamic\.onnx.*dynamic axes: input_ids"):
                    worker.load("b", write_mlp(tmp_path / "dynamic.onnx", 32, opset=16))
                assert worker.time("a", n=1)  # a refusal leaves the worker usable
    np.testing.assert_allclose(outputs["deepsparse"], outputs["onnxruntime"], atol=1e-4)


def test_a_missing_engine_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(EngineError, match=f"engine {name}, found it not installed; run: pip install"):
            get_engine(name).version()
