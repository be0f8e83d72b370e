"""Workers that time a model on calls of several shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.engines import WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.engines.worker.protocol import parse
from ziplm_deploy.errors import EngineError
from ziplm_deploy.recipe import Environment, Workload


def start(options: WorkerOptions) -> WorkerHandle:
    return get_engine("onnxruntime").start_worker(options)


def test_a_model_is_timed_on_every_call(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 4096)
    with start(WorkerOptions(batch_size=2, seq_len=256, calls=((2, 8, 0), (2, 256, 0)))) as worker:
        worker.load("a", path)
        times_ms = worker.time_many([("a", 0), ("a", 1)] * 5)
        assert np.median(times_ms[1::2]) > 3 * np.median(times_ms[::2]) > 0
        assert np.median(worker.time("a", n=5, call=1)) > 3 * np.median(worker.time("a", n=5))
        with pytest.raises(EngineError, match="IndexError"):
            worker.time("a", n=1, call=2)


def test_a_fixed_shape_takes_no_second_call(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 8, batch=2, tokens=16)
    options = WorkerOptions(batch_size=2, seq_len=16, calls=((2, 8, 0), (2, 16, 0)))
    with start(options) as worker, pytest.raises(EngineError, match="fixed shape"):
        worker.load("a", path)


def test_calls_come_from_the_command_line() -> None:
    assert parse(["--batch-size", "2", "--seq-len", "16"]).calls == [(2, 16, 0)]
    assert parse(["--calls", "1x8,1x1+128"]).calls == [(1, 8, 0), (1, 1, 128)]


def test_options_hold_the_calls_of_a_workload_with_several() -> None:
    mixed = Environment(workload=Workload(batch_size=2, lengths={64: 1, 16: 3}))
    options = WorkerOptions.from_environment(mixed)
    assert (options.batch_size, options.seq_len, options.calls) == (2, 64, ((2, 16, 0), (2, 64, 0)))
    assert WorkerOptions.from_environment(Environment()).calls == ()
