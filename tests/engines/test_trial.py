"""Trial loads: a process that dies costs one model, not the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.engines import WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.engines.trial import ModelRefusedError, Trial
from ziplm_deploy.errors import EngineError


def start() -> WorkerHandle:
    return get_engine("onnxruntime").start_worker(WorkerOptions(seq_len=4))


def test_a_good_model_is_let_go_of_again(tmp_path: Path) -> None:
    path = tmp_path / "good.onnx"
    write_mlp(path, 8)
    with Trial(start) as trial:
        trial.run(path)
        trial.run(path)  # the same name is free again


def test_after_a_rejected_model_and_a_dead_process_the_next_one_is_tried(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    write_mlp(good, 8)
    bad.write_bytes(b"no model")
    workers: list[WorkerHandle] = []

    def counted() -> WorkerHandle:
        workers.append(start())
        return workers[-1]

    with Trial(counted) as trial:
        with pytest.raises(ModelRefusedError, match=r"bad\.onnx"):
            trial.run(bad)
        trial.run(good)
        os.kill(workers[-1]._process.pid, signal.SIGKILL)
        with pytest.raises(ModelRefusedError, match="SIGKILL"):
            trial.run(good)
        trial.run(good)
    assert len(workers) == 3


def test_neither_a_worker_that_does_not_come_up_nor_a_missing_file_is_a_refusal(tmp_path: Path) -> None:
    def broken() -> WorkerHandle:
        raise EngineError("out of memory")

    path = tmp_path / "good.onnx"
    write_mlp(path, 8)
    for start_it, wanted, message in ((broken, path, "out of memory"), (start, tmp_path / "none.onnx", "found none")):
        with Trial(start_it) as trial, pytest.raises(EngineError, match=message) as caught:
            trial.run(wanted)
        assert not isinstance(caught.value, ModelRefusedError)


def test_nothing_is_started_before_it_is_needed() -> None:
    with Trial(lambda: pytest.fail("no model was tried")):
        pass
