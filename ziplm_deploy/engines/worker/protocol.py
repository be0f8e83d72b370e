"""Requests and replies of a worker: it loads ONNX files, times them, returns their outputs.

JSON lines: a request on stdin, a reply ``{"ok": true, …}`` or ``{"ok": false, "error": …}`` on stdout. The worker ends
at EOF.

Requests (``do``): ``hello`` · ``load {id, path}`` · ``run {id, call, n, warmup, warmup_ms}`` ·
``run_many {order, warmup, warmup_ms}`` with pairs ``[id, call]`` in ``order`` · ``infer {id, inputs, outputs}`` (npz
files) · ``unload {id}`` · ``memory`` · ``quit``. Models are timed on calls of one shape or several; ``call`` is the
place of one in ``--calls``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from .cache import CachedModel, is_causal
from .facts import page_of
from .inputs import make_ids, make_inputs

TURN_VARIABLE = "ZIPLM_WORKER_TURN"  # names the file in which a worker says which of several models it runs
TURN_BYTES = 256
PR_SET_THP_DISABLE = 41  # linux/prctl.h
SIGN_SECONDS = 1.0  # between signs of life during long runs; short ones are not disturbed


class Worker:
    """Answers requests; keeps one session per id, and its timing inputs for every call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        page = importlib.import_module(f".{page_of(options.engine)}", __package__)
        for name in page.FACTS.imports:
            importlib.import_module(name)
        if options.cpus and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {int(cpu) for cpu in options.cpus.split(",")})
        self.engine = page.Sessions(options)
        self.sessions: dict[str, Any] = {}
        self.runs: dict[str, list[Callable[[], float]]] = {}
        self.announced = 0.0
        turn = os.environ.get(TURN_VARIABLE)
        self.turn = open(turn, "wb", buffering=0) if turn else None  # noqa: SIM115 (open as long as the process)

    def do_hello(self, request: dict[str, Any]) -> dict[str, Any]:
        """Version of the engine, and this process."""
        return {"version": self.engine.version, "pid": os.getpid()}

    def do_load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make a session of a file, with inputs to time it on; returns the names, types and shapes that it declares."""
        session = self.engine.load(request["path"])
        self.runs[request["id"]] = self._runs(session)
        self.sessions[request["id"]] = session
        describe = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
        return {
            side: [{"name": entry.name, "type": entry.type, "shape": list(entry.shape)} for entry in entries]
            for side, entries in describe.items()
        }

    def _runs(self, session: Any) -> list[Callable[[], float]]:
        """One run of every call that models are timed on; each returns its milliseconds."""
        if hasattr(session, "timed_calls"):  # an engine that keeps caches, and time, by itself
            own: list[Callable[[], float]] = session.timed_calls(self.options.calls)
            return own
        return [functools.partial(milliseconds_of, run) for run in self._plain_runs(session)]

    def _plain_runs(self, session: Any) -> list[Callable[[], Any]]:
        if is_causal(session):
            longest = max(tokens + length for _, tokens, length in self.options.calls)
            models: dict[int, CachedModel] = {}
            runs = []
            for batch_size, tokens, length in self.options.calls:
                model = models.setdefault(batch_size, CachedModel(session, batch_size, longest))
                runs.append(model.rehearsal(make_ids(batch_size, tokens), length))
            return runs
        inputs = [make_inputs(session.get_inputs(), *call[:2]) for call in self.options.calls]
        return [functools.partial(session.run, None, each) for each in inputs]

    def do_run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds of consecutive runs of one model on one call."""
        model_id, call = request["id"], request["call"]
        self._announce(model_id)
        self._warm_up(model_id, call, request)
        return {"ms": [self._timed_run(model_id, call) for _ in range(request["n"])]}

    def do_run_many(self, request: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds of one run of each model and call in turn, each after untimed ones."""
        samples_ms = []
        for model_id, call in request["order"]:
            self._announce(model_id)
            self._warm_up(model_id, call, request)
            samples_ms.append(self._timed_run(model_id, call))
        return {"ms": samples_ms}

    def _announce(self, model_id: str) -> None:
        """Leave word of whose turn it is, for a parent that finds this process dead, or wonders whether it hangs."""
        self.announced = time.monotonic()
        if self.turn is not None:
            self.turn.seek(0)
            self.turn.write(model_id.encode().ljust(TURN_BYTES))  # over the last one: it is whole at any moment

    def _warm_up(self, model_id: str, call: int, request: dict[str, Any]) -> None:
        spent_ms, runs = 0.0, 0
        while runs < request["warmup"] or spent_ms < request["warmup_ms"]:
            spent_ms += self._timed_run(model_id, call)
            runs += 1

    def do_infer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write the outputs for given inputs to an npz file; returns their names."""
        session = self.sessions[request["id"]]
        with np.load(request["inputs"]) as archive:
            inputs = {name: archive[name] for name in archive.files}
        names = [entry.name for entry in session.get_outputs()]
        np.savez(request["outputs"], **dict(zip(names, session.run(names, inputs))))  # noqa: B905 (Python 3.8)
        return {"names": names}

    def do_unload(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let go of a session and its inputs."""
        del self.sessions[request["id"]], self.runs[request["id"]]
        gc.collect()
        return {}

    def do_memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Largest resident set of this process so far, and what of its memory lies in huge pages now."""
        return {"peak_bytes": peak_memory_bytes(), "huge_page_bytes": huge_page_bytes()}

    def _timed_run(self, model_id: str, call: int) -> float:
        ms = self.runs[model_id][call]()
        if time.monotonic() - self.announced > SIGN_SECONDS:
            self._announce(model_id)
        return ms

    def answer(self, line: str) -> dict[str, Any]:
        """Reply to a request, errors included."""
        try:
            request = json.loads(line)
            return {"ok": True, **getattr(self, f"do_{request['do']}")(request)}
        except Exception as error:  # a rejected model must not end the process: the parent decides
            traceback.print_exc()
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def milliseconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock time of one run."""
    start = time.perf_counter()
    run()
    return 1000.0 * (time.perf_counter() - start)


def peak_memory_bytes() -> int:
    """Largest resident set so far, interpreter and engine included."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def huge_page_bytes() -> int | None:
    """Anonymous memory of this process in transparent huge pages; None where the system does not tell."""
    try:
        with open("/proc/self/smaps_rollup", encoding="utf-8") as sums:
            return next(int(line.split()[1]) * 1024 for line in sums if line.startswith("AnonHugePages"))
    except (OSError, StopIteration):
        return None


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of a worker from its command line."""
    parser = argparse.ArgumentParser(description="Run ONNX files in a process of their own.")
    parser.add_argument("--engine", default="onnxruntime", help="name of a page NAME_session.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a request; of several calls the most")
    parser.add_argument("--calls", default="", help="shapes to time, BATCHxTOKENS[+CACHED],…; default: one")
    parser.add_argument("--shared-arena", action="store_true", help="one activation arena for all sessions")
    parser.add_argument("--plain-pages", action="store_true", help="no transparent huge pages for this process")
    parser.add_argument("--cpus", default="", help="comma-separated CPU numbers to run on")
    parser.add_argument("--memory-limit-bytes", type=int, default=0, help="largest address space; 0: no limit")
    parser.add_argument("--probe", metavar="MODEL", help="load MODEL, run it five times, print milliseconds")
    options = parser.parse_args(arguments)
    options.calls = shapes_of(options.calls) or [(options.batch_size, options.seq_len, 0)]
    return options


def shapes_of(calls: str) -> list[tuple[int, int, int]]:
    """Batch size, tokens and cached tokens of every call in ``BATCHxTOKENS[+CACHED],…``."""
    found = []
    for call in filter(None, calls.split(",")):
        shape, _, cached = call.partition("+")
        batch_size, _, seq_len = shape.partition("x")
        found.append((int(batch_size), int(seq_len), int(cached or 0)))
    return found


def main(arguments: list[str]) -> int:
    """Answer requests until there are no more; with ``--probe`` time one file and end."""
    options = parse(arguments)
    if options.memory_limit_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (options.memory_limit_bytes, options.memory_limit_bytes))
    if options.plain_pages:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    # Engines print to stdout as they please; replies go to a private copy of it.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(options)
    if options.probe:
        requests = [
            {"do": "load", "id": "probe", "path": options.probe},
            *(
                {"do": "run", "id": "probe", "call": call, "n": 5, "warmup": 1, "warmup_ms": 0.0}
                for call in range(len(options.calls))
            ),
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
