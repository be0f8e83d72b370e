"""What every inference engine offers, and the handle of a worker process that runs one."""

from __future__ import annotations

import atexit
import importlib.metadata
import shlex
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ziplm_deploy.engines.worker.facts import EngineFacts
from ziplm_deploy.engines.worker.protocol import TURN_VARIABLE
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.huge_pages import check_huge_pages, with_huge_pages
from ziplm_deploy.machine.info import MachineInfo, allowed_cpus, check_threads, machine_info
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.machine.side_environments import ENVIRONMENTS, quiet_environment
from ziplm_deploy.machine.worker_process import WorkerGoneError, WorkerProcess
from ziplm_deploy.recipe import Environment

WORKER = Path(__file__).with_name("worker")
Array = npt.NDArray[Any]
Timed = tuple[str, int]  # a model's id, and which of the workload's calls it is timed on
# Untimed runs before each turn of a model, in a table as in a benchmark. After another model or process, caches and
# clock need milliseconds until they are those of a server that is kept busy: one untimed run is enough for 40 ms of
# dense model, but made one of 2 ms look 6 % slower in ONNX Runtime.
TURN_WARMUP_MS = 10.0


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs its models; part of what a timing means."""

    threads: int = 1
    batch_size: int = 1
    seq_len: int = 128  # of several calls the most
    # Batch size, tokens and cached tokens of several calls that models are timed on; none: the one.
    calls: tuple[tuple[int, int, int], ...] = ()
    huge_pages: bool = False
    plain_pages: bool = False  # none, also where the system or its user gives them to every process
    shared_arena: bool = False  # for a worker that holds many sessions
    timeout_seconds: float = 600.0  # without a finished run or another sign of life; a hung engine is killed after it
    memory_limit_bytes: int | None = None  # address space of the process, for files from anywhere

    @classmethod
    def from_environment(cls, environment: Environment) -> WorkerOptions:
        """Options with the threads and the workload of an environment."""
        workload = environment.workload
        shapes = tuple((call.batch_size, call.seq_len, call.cache_length or 0) for call in workload.calls)
        return cls(
            environment.threads,
            workload.batch_size,
            workload.seq_len,
            shapes if workload.has_several else (),
            huge_pages=environment.huge_pages,
        )


@dataclass(frozen=True)
class TensorInfo:
    """Name, ONNX type and shape (symbolic axes are names or None) of a model's input or output."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class ModelSignature:
    """Inputs and outputs that a model declares."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class Engine:
    """An inference engine: what its page in ``worker/`` says about it, and how its processes are started."""

    def __init__(self, name: str, facts: EngineFacts) -> None:
        self.name, self.facts = name, facts
        self._environment = ENVIRONMENTS[name] if facts.has_own_environment else None

    @property
    def notice(self) -> str:
        """What users must know before they deploy with it; mostly empty."""
        return "" if self._environment is None else self._environment.notice

    @property
    def may_abort(self) -> bool:
        """Whether a model that it cannot run may end its process."""
        return self.facts.may_abort

    def check_machine(self, machine: MachineInfo) -> None:
        """Raise :class:`EngineError` on a CPU whose instructions the engine was not built for: it would only crash."""
        if self.facts.needs_one_of and not set(self.facts.needs_one_of) & set(machine.isa_flags):
            raise EngineError(
                f"expected a CPU with {' or '.join(map(str.upper, self.facts.needs_one_of))} for {self.name}, found "
                f"{machine.cpu_model} with {' '.join(machine.isa_flags) or 'none that it knows'}; use engine "
                "onnxruntime"
            )

    def version(self) -> str:
        """Installed version; raises EngineError with the command that installs it."""
        self.check_machine(machine_info())
        if self._environment is not None:
            return self._environment.version()
        try:
            return importlib.metadata.version(self.facts.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise EngineError(
                f"expected the engine {self.name}, found it not installed; run: {self.facts.install}"
            ) from None

    def interpreter(self) -> str:
        """Python that has the engine."""
        return sys.executable if self._environment is None else self._environment.interpreter()

    def start_worker(self, options: WorkerOptions, *, wait: bool = True) -> WorkerHandle:
        """Start a worker process.

        Without ``wait`` it imports its engine while others do; the first request finds out whether it came up.

        Raises:
            EnvironmentMismatchError: more threads than granted, or no huge pages where they are asked for.
            EngineError: the process did not come up.
        """
        check_threads(options.threads)
        if options.huge_pages:
            check_huge_pages()
        self.version()
        handle = WorkerHandle(self.name, self.interpreter(), options)
        if wait:
            handle.wait_until_ready()
        return handle


class WorkerHandle:
    """A running worker process. Use it as a context manager; every failure is an :class:`EngineError`."""

    def __init__(self, engine: str, interpreter: str, options: WorkerOptions) -> None:
        self.options = options
        # The highest CPUs: interrupts and the parent live on the lowest. All workers share them and take turns.
        cpus = allowed_cpus()[-options.threads :]
        self._arguments = [
            *("--engine", engine, "--threads", str(options.threads), "--batch-size", str(options.batch_size)),
            *("--seq-len", str(options.seq_len), "--cpus", ",".join(map(str, cpus))),
            *(["--calls", ",".join(map(_as_text, options.calls))] if options.calls else []),
            *(["--shared-arena"] if options.shared_arena else []),
            *(["--plain-pages"] if options.plain_pages else []),
            *(["--memory-limit-bytes", str(options.memory_limit_bytes)] if options.memory_limit_bytes else []),
        ]
        self._interpreter = interpreter
        self._paths: dict[str, Path] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="worker-", dir=scratch_root())
        self._process = self._spawn()
        self.version = ""  # of the engine, once the process has come up
        _LIVE.add(self)
        self._process.send({"do": "hello"})

    def wait_until_ready(self) -> None:
        """Wait until the engine is imported.

        Raises:
            EngineError: the process died or hangs; it is ended.
        """
        if self.version:
            return
        try:
            self.version = self._receive("hello")["version"]
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> WorkerProcess:
        environment = {**quiet_environment(), "OMP_NUM_THREADS": str(self.options.threads)}
        environment[TURN_VARIABLE] = str(self._turn)
        if self.options.huge_pages:
            environment = with_huge_pages(environment)
        log = Path(self._folder.name) / "stderr.txt"
        try:
            return WorkerProcess([self._interpreter, str(WORKER), *self._arguments], log, environment=environment)
        except OSError as error:
            self._folder.cleanup()
            raise EngineError(
                f"expected a Python interpreter with the engine at {self._interpreter}, found: {error}; install one"
            ) from error

    def load(self, model_id: str, path: Path) -> ModelSignature:
        """Make a session for the ONNX file ``path`` under ``model_id``.

        Raises:
            EngineError: the file is missing, or the engine rejects it, dies or hangs.
        """
        self._paths[model_id] = path
        if not path.is_file():
            raise EngineError(f"expected an ONNX file at {path}, found none; export it or check the path")
        reply = self._request("load", id=model_id, path=str(path))
        return ModelSignature(*(tuple(map(_tensor_info, reply[side])) for side in ("inputs", "outputs")))

    def time(self, model_id: str, n: int, warmup: int = 1, warmup_ms: float = 0.0, call: int = 0) -> list[float]:
        """Milliseconds of ``n`` consecutive runs after untimed ones, at least ``warmup`` and ``warmup_ms``.

        ``call``: which of the workload's calls, by its place among them.
        """
        reply = self._request("run", id=model_id, call=call, n=n, warmup=warmup, warmup_ms=warmup_ms)
        return list(map(float, reply["ms"]))

    def time_many(self, order: Sequence[Timed], warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        """Milliseconds of one run of each model and call in ``order``, each after untimed ones as in :meth:`time`."""
        reply = self._request("run_many", order=list(order), warmup=warmup, warmup_ms=warmup_ms)
        return list(map(float, reply["ms"]))

    def infer(self, model_id: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the model by name."""
        source, target = (str(Path(self._folder.name) / name) for name in ("inputs.npz", "outputs.npz"))
        np.savez(source, **dict(inputs))  # type: ignore[arg-type]  # numpy types its keyword allow_pickle only
        self._request("infer", id=model_id, inputs=source, outputs=target)
        with np.load(target) as archive:
            return {name: archive[name] for name in archive.files}

    def unload(self, model_id: str) -> None:
        self._request("unload", id=model_id)

    def peak_memory_bytes(self) -> int:
        """Largest resident set of the worker so far: interpreter, engine and models."""
        return int(self._request("memory")["peak_bytes"])

    def huge_page_bytes(self) -> int | None:
        """Memory of the worker that lies in transparent huge pages now; None where the system does not tell."""
        found: int | None = self._request("memory")["huge_page_bytes"]
        return found

    def close(self) -> None:
        """End the process; safe to call twice and after a failure."""
        _LIVE.discard(self)
        self._process.close({"do": "quit"})
        self._folder.cleanup()

    def __enter__(self) -> WorkerHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._process.kill()
        self.close()

    def _request(self, do: str, **fields: Any) -> dict[str, Any]:
        self.wait_until_ready()
        self._process.send({"do": do, **fields})
        return self._receive(do, fields.get("id"))

    def _receive(self, do: str, model_id: str | None = None) -> dict[str, Any]:
        try:
            reply = self._process.receive(self.options.timeout_seconds, sign_of_life=self._turn)
        except WorkerGoneError as error:
            raise self._failure(str(error), do, model_id or self._whose_turn(do)) from error
        if not reply["ok"]:
            raise self._failure(str(reply["error"]), do, model_id)
        return reply

    @property
    def _turn(self) -> Path:
        return Path(self._folder.name) / "turn.txt"

    def _whose_turn(self, do: str) -> str | None:
        """The model that a worker ran when it died over several."""
        said = self._turn.read_text(encoding="utf-8").strip() if self._turn.is_file() else ""
        return said if said and do == "run_many" else None

    def _failure(self, found: str, do: str, model_id: str | None) -> EngineError:
        path = self._paths.get(model_id) if model_id is not None else None
        what = f"the engine to {do.removesuffix('_many')} {path or model_id or 'its models'}"
        command = [*self._process.command, "--probe", str(path or "MODEL.onnx")]
        return EngineError(
            f"expected {what}, found: {found}; reproduce with: {shlex.join(command)}{self._process.last_words()}"
        )


def _as_text(call: tuple[int, int, int]) -> str:
    batch_size, tokens, cached = call
    return f"{batch_size}x{tokens}" + (f"+{cached}" if cached else "")


def _tensor_info(entry: dict[str, Any]) -> TensorInfo:
    return TensorInfo(entry["name"], entry["type"], tuple(entry["shape"]))


_LIVE: weakref.WeakSet[WorkerHandle] = weakref.WeakSet()


def close_all_workers() -> None:
    """End every worker that is still running (registered with ``atexit``)."""
    for handle in list(_LIVE):
        handle.close()


atexit.register(close_all_workers)
