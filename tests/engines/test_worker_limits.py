"""What a worker may take: time as long as it goes on, and memory as its file may be from anywhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.helpers.onnx_models import write, write_mlp
from ziplm_deploy.engines import WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import TimedFile, start_worker
from ziplm_deploy.recipe import Environment

LIMIT_BYTES = 3 << 30


def write_bomb(path: Path) -> Path:
    """A file of a few hundred bytes whose only output takes 12 GB."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("Add", ["large", "x"], ["output"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n"])]
    return write(path, nodes, inputs, outputs, {"shape": np.array([3_000_000_000])})


def load_and_run(worker: WorkerHandle, path: Path) -> list[float]:
    worker.load("a", path)
    return worker.time("a", n=1)


def test_a_few_bytes_of_graph_take_no_more_memory_than_allowed(tmp_path: Path) -> None:
    bomb, good = write_bomb(tmp_path / "bomb.onnx"), write_mlp(tmp_path / "good.onnx", 8)
    with start_worker(TimedFile(bomb, memory_limit_bytes=LIMIT_BYTES), Environment()) as worker:
        with pytest.raises(EngineError, match=r"(?s)bomb\.onnx.*(memory|alloc)"):
            load_and_run(worker, bomb)
        assert load_and_run(worker, good)
        assert worker.peak_memory_bytes() < LIMIT_BYTES


def test_a_worker_that_goes_on_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    """The time limit is for one run: many of them may take longer together."""
    with get_engine("onnxruntime").start_worker(WorkerOptions(timeout_seconds=20.0)) as worker:
        worker.load("a", write_mlp(tmp_path / "a.onnx", 8))
        worker.options = WorkerOptions(timeout_seconds=1.5)
        began = time.monotonic()
        assert worker.time("a", n=1, warmup_ms=6000.0)
        assert time.monotonic() - began > 3.0


def test_a_worker_that_stops_in_the_midst_of_many_runs_is_killed(tmp_path: Path) -> None:
    with get_engine("onnxruntime").start_worker(WorkerOptions(timeout_seconds=20.0)) as worker:
        worker.load("a", write_mlp(tmp_path / "a.onnx", 8))
        worker.options = WorkerOptions(timeout_seconds=1.5)
        threading.Timer(2.0, os.kill, [worker._process.pid, signal.SIGSTOP]).start()
        with pytest.raises(EngineError, match=r"a\.onnx.*no answer within 1\.5 s"):
            worker.time_many([("a", 0)] * 3, warmup_ms=20_000.0)
        assert not worker._process.running()
