"""The process that runs an engine: loads ONNX files, times them, returns their outputs.

One self-contained file that needs numpy and its engine only, so that another interpreter can run it too. It speaks JSON
lines: a request on stdin, a reply ``{"ok": true, …}`` or ``{"ok": false, "error": …}`` on stdout. It ends at EOF.

Requests (``do``): ``hello`` · ``load {id, path}`` · ``run {id, n, warmup, warmup_ms}`` ·
``run_many {order, warmup, warmup_ms}`` · ``infer {id, inputs, outputs}`` (npz files) · ``unload {id}`` · ``memory`` ·
``quit``.

By hand, to reproduce a failure: ``python worker.py --probe model.onnx --batch-size 1 --seq-len 128``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np

INPUT_SEED = 0
TURN_VARIABLE = "ZIPLM_WORKER_TURN"  # names the file in which a worker says which of several models it runs
TURN_BYTES = 256
IMAGE_SIZE = {"channel": 3, "height": 224, "width": 224}
NUMPY_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
}


class OnnxRuntime:
    """Sessions of one process with the same options."""

    def __init__(self, options: argparse.Namespace) -> None:
        import onnxruntime

        self.ort = onnxruntime
        self.version: str = onnxruntime.__version__
        onnxruntime.set_default_logger_severity(3)
        self.session_options = onnxruntime.SessionOptions()
        self.session_options.intra_op_num_threads = options.threads
        self.session_options.inter_op_num_threads = 1
        # Threads that spin after a run disturb whatever is timed next.
        self.session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session_options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if options.shared_arena:  # sixty sessions with an arena each would hold sixty peaks of activations
            memory = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            onnxruntime.create_and_register_allocator(memory, None)
            self.session_options.add_session_config_entry("session.use_env_allocators", "1")

    def load(self, path: str) -> Any:
        return self.ort.InferenceSession(path, self.session_options, providers=["CPUExecutionProvider"])


class OpenVino:
    """Compiled models of one process with the same options; inference is float32, as the others compute."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would fork a process that calls out
        import openvino

        self.version: str = openvino.__version__.split("-")[0]
        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # the process as a whole is bound to its CPUs
        }

    def load(self, path: str) -> OpenVinoSession:
        return OpenVinoSession(self.core.compile_model(self.core.read_model(path), "CPU", self.settings))


OPENVINO_TYPES = {"i64": "tensor(int64)", "i32": "tensor(int32)", "boolean": "tensor(bool)", "f32": "tensor(float)"}


class OpenVinoSession:
    """A compiled model behind the methods of an ONNX Runtime session that this file uses."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.inputs = [self._entry(port) for port in compiled.inputs]
        self.outputs = [self._entry(port) for port in compiled.outputs]

    def _entry(self, port: Any) -> argparse.Namespace:
        kind = port.get_element_type().get_type_name()
        shape = [None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]
        return argparse.Namespace(name=port.get_any_name(), type=OPENVINO_TYPES.get(kind, kind), shape=shape)

    def get_inputs(self) -> list[argparse.Namespace]:
        return self.inputs

    def get_outputs(self) -> list[argparse.Namespace]:
        return self.outputs

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.request.infer(inputs, share_inputs=True)
        return [found[name] for name in (names or [entry.name for entry in self.outputs])]


class DeepSparse:
    """Compiled models of one process. Files that the engine would run in its slow fallback are refused.

    Analytics are off.
    """

    NEWEST_OPSET = 16  # of 17 and 18 a part falls back, above them everything

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ["NM_DISABLE_ANALYTICS"] = "1"
        import importlib.metadata

        import deepsparse

        self.engine_class = deepsparse.Engine
        self.version: str = importlib.metadata.version("deepsparse")
        self.options = options

    def load(self, path: str) -> DeepSparseSession:
        import onnx

        model = onnx.load(path, load_external_data=False)
        opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset > self.NEWEST_OPSET:
            raise ValueError(
                f"opset {opset}; DeepSparse runs opsets above {self.NEWEST_OPSET} in a slow fallback: export with "
                f"opset {self.NEWEST_OPSET}"
            )
        weights = {tensor.name for tensor in model.graph.initializer}  # old files list them among the inputs
        inputs = [_onnx_entry(value) for value in model.graph.input if value.name not in weights]
        dynamic = [f"{entry.name} {entry.shape}" for entry in inputs if not _is_fixed(entry.shape)]
        if dynamic:
            raise ValueError(
                f"dynamic axes: {', '.join(dynamic)}; DeepSparse runs them in a slow fallback: export with static "
                f"shapes of batch size {self.options.batch_size} and {self.options.seq_len} tokens"
            )
        make_inputs(inputs, self.options.batch_size, self.options.seq_len)  # refuses other shapes before compiling
        engine = self.engine_class(
            model=path,
            batch_size=self.options.batch_size,
            num_cores=self.options.threads,
        )
        return DeepSparseSession(engine, inputs, [_onnx_entry(value) for value in model.graph.output])


class DeepSparseSession:
    """A compiled model behind the methods of an ONNX Runtime session that this file uses."""

    def __init__(self, engine: Any, inputs: list[argparse.Namespace], outputs: list[argparse.Namespace]) -> None:
        self.engine, self.inputs, self.outputs = engine, inputs, outputs

    def get_inputs(self) -> list[argparse.Namespace]:
        return self.inputs

    def get_outputs(self) -> list[argparse.Namespace]:
        return self.outputs

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        wrong = [f"{e.name} {inputs[e.name].shape}" for e in self.inputs if list(inputs[e.name].shape) != e.shape]
        if wrong:  # the engine itself would end the process
            expected = ", ".join(f"{entry.name} {tuple(entry.shape)}" for entry in self.inputs)
            raise ValueError(f"inputs {', '.join(wrong)}; the model was compiled for {expected}")
        found = self.engine.run([np.ascontiguousarray(inputs[entry.name]) for entry in self.inputs])
        by_name = {entry.name: value for entry, value in zip(self.outputs, found)}  # noqa: B905 (Python 3.8)
        return [by_name[name] for name in (names or by_name)]


def _is_fixed(shape: list[Any]) -> bool:
    return all(isinstance(axis, int) and axis > 0 for axis in shape)


def _onnx_entry(value: Any) -> argparse.Namespace:
    """Name, type and shape of a graph input or output, as ONNX Runtime calls them."""
    kinds = {1: "tensor(float)", 6: "tensor(int32)", 7: "tensor(int64)", 9: "tensor(bool)", 11: "tensor(double)"}
    tensor = value.type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in tensor.shape.dim]
    return argparse.Namespace(name=value.name, type=kinds.get(tensor.elem_type, str(tensor.elem_type)), shape=shape)


ENGINES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "deepsparse": DeepSparse}


def make_inputs(metadata: list[Any], batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """Inputs for timing: ids in a small range that every vocabulary has, full masks, normal floats.

    Raises ValueError where a fixed axis of the model contradicts ``batch_size`` or ``seq_len``.
    """
    generator = np.random.default_rng(INPUT_SEED)
    return {entry.name: _make_input(entry, batch_size, seq_len, generator) for entry in metadata}


def _make_input(entry: Any, batch_size: int, seq_len: int, generator: np.random.Generator) -> np.ndarray:
    if entry.type not in NUMPY_TYPES:
        raise ValueError(f"input {entry.name!r} has type {entry.type}; known are {', '.join(NUMPY_TYPES)}")
    dtype = NUMPY_TYPES[entry.type]
    is_float = np.issubdtype(dtype, np.floating)
    shape = [_axis(entry, axis, batch_size, seq_len, is_float) for axis in range(len(entry.shape))]
    name = entry.name.lower()
    if is_float:
        return generator.standard_normal(shape).astype(dtype)
    if "mask" in name or dtype is np.bool_:
        return np.ones(shape, dtype)
    if "type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1, dtype=dtype), shape).copy()
    return generator.integers(4, 24, shape).astype(dtype)


def _axis(entry: Any, axis: int, batch_size: int, seq_len: int, is_float: bool) -> int:
    size, rank = entry.shape[axis], len(entry.shape)
    wanted = batch_size if axis == 0 else seq_len if axis == 1 and rank == 2 else None
    if isinstance(size, int) and size > 0:
        if wanted is not None and size != wanted and not (is_float and axis == 1):
            raise ValueError(
                f"input {entry.name!r} has the fixed shape {entry.shape}, but batch size {batch_size} and {seq_len} "
                "tokens were asked for; ask for those of the file, or export it for these"
            )
        return size
    if wanted is not None:
        return wanted
    for part, default in IMAGE_SIZE.items():
        if isinstance(size, str) and part in size.lower():
            return default
    return {1: 3, 2: 224, 3: 224}[axis] if rank == 4 and is_float else seq_len


class Worker:
    """Answers requests; keeps one session and its timing inputs per id."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = ENGINES[options.engine](options)
        self.sessions: dict[str, Any] = {}
        self.inputs: dict[str, dict[str, np.ndarray]] = {}
        turn = os.environ.get(TURN_VARIABLE)
        self.turn = open(turn, "wb", buffering=0) if turn else None  # noqa: SIM115 (open as long as the process)

    def do_hello(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"version": self.engine.version, "pid": os.getpid()}

    def do_load(self, request: dict[str, Any]) -> dict[str, Any]:
        session = self.engine.load(request["path"])
        self.inputs[request["id"]] = make_inputs(session.get_inputs(), self.options.batch_size, self.options.seq_len)
        self.sessions[request["id"]] = session
        describe = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
        return {
            side: [{"name": entry.name, "type": entry.type, "shape": list(entry.shape)} for entry in entries]
            for side, entries in describe.items()
        }

    def do_run(self, request: dict[str, Any]) -> dict[str, Any]:
        self._warm_up(request["id"], request)
        return {"ms": [self._timed_run(request["id"]) for _ in range(request["n"])]}

    def do_run_many(self, request: dict[str, Any]) -> dict[str, Any]:
        samples_ms = []
        for model_id in request["order"]:
            self._announce(model_id)
            self._warm_up(model_id, request)
            samples_ms.append(self._timed_run(model_id))
        return {"ms": samples_ms}

    def _announce(self, model_id: str) -> None:
        """Leave word of whose turn it is, for a parent that finds this process dead."""
        if self.turn is not None:
            self.turn.seek(0)
            self.turn.write(model_id.encode().ljust(TURN_BYTES))  # over the last one: it is whole at any moment

    def _warm_up(self, model_id: str, request: dict[str, Any]) -> None:
        spent_ms, runs = 0.0, 0
        while runs < request["warmup"] or spent_ms < request["warmup_ms"]:
            spent_ms += self._timed_run(model_id)
            runs += 1

    def do_infer(self, request: dict[str, Any]) -> dict[str, Any]:
        session = self.sessions[request["id"]]
        with np.load(request["inputs"]) as archive:
            inputs = {name: archive[name] for name in archive.files}
        names = [entry.name for entry in session.get_outputs()]
        np.savez(request["outputs"], **dict(zip(names, session.run(names, inputs))))  # noqa: B905 (Python 3.8)
        return {"names": names}

    def do_unload(self, request: dict[str, Any]) -> dict[str, Any]:
        del self.sessions[request["id"]], self.inputs[request["id"]]
        gc.collect()
        return {}

    def do_memory(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"peak_bytes": peak_memory_bytes()}

    def _timed_run(self, model_id: str) -> float:
        session, inputs = self.sessions[model_id], self.inputs[model_id]
        start = time.perf_counter()
        session.run(None, inputs)
        return 1000.0 * (time.perf_counter() - start)

    def answer(self, line: str) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return {"ok": True, **getattr(self, f"do_{request['do']}")(request)}
        except Exception as error:  # a rejected model must not end the process: the parent decides
            traceback.print_exc()
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def peak_memory_bytes() -> int:
    """Largest resident set so far, interpreter and engine included."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run ONNX files in a process of their own.")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--shared-arena", action="store_true", help="one activation arena for all sessions")
    parser.add_argument("--cpus", default="", help="comma-separated CPU numbers to run on")
    parser.add_argument("--probe", metavar="MODEL", help="load MODEL, run it five times, print milliseconds")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in options.cpus.split(",")})
    # Engines print to stdout as they please; replies go to a private copy of it.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(options)
    if options.probe:
        requests = [
            {"do": "load", "id": "probe", "path": options.probe},
            {"do": "run", "id": "probe", "n": 5, "warmup": 1, "warmup_ms": 0.0},
        ]
        answers = [worker.answer(json.dumps(request)) for request in requests]
        print(*map(json.dumps, answers), sep="\n", file=replies, flush=True)
        return 0 if all(answer["ok"] for answer in answers) else 1
    for line in sys.stdin:
        if json.loads(line)["do"] == "quit":
            break
        print(json.dumps(worker.answer(line)), file=replies, flush=True)
    replies.flush()
    os._exit(0)  # freeing gigabytes of sessions one by one takes seconds and serves nobody


if __name__ == "__main__":
    # Python put this file's folder first on the path, where onnxruntime.py is our adapter and not the engine.
    sys.path = [entry for entry in sys.path if os.path.realpath(entry) != os.path.dirname(os.path.realpath(__file__))]
    sys.exit(main(sys.argv[1:]))
