"""One process alone needs nothing of this; several share the training and leave the rest to the first."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, write_rows
from ziplm_deploy.machine import distributed
from ziplm_deploy.reporting.records import FamilyReport


def test_one_process_is_the_first_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (distributed.n_processes(), distributed.is_first()) == (1, True)
    distributed.wait()
    with distributed.first_alone():
        pass


def test_the_rank_decides_who_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (distributed.n_processes(), distributed.is_first()) == (2, False)
    monkeypatch.setenv("RANK", "0")
    assert distributed.is_first()


def test_processes_of_one_machine_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert distributed.threads_of_this_process(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert [distributed.threads_of_this_process(granted) for granted in (8, 2)] == [2, 1]


@pytest.mark.slow
def test_two_processes_train_one_family(tmp_path: Path) -> None:
    save_dense(tmp_path / "model", task="text-classification", hidden_size=128, intermediate_size=512)
    write_rows(tmp_path / "train.jsonl", 80, 0)
    write_rows(tmp_path / "test.jsonl", 30, 1)
    training = {"mode": "gradual", "max_steps": 4, "batch_size": 8, "save_steps": 2}
    raw = raw_recipe(tmp_path, speedups=[1.5, 2.0], recover=training)
    # these models take microseconds, and a missed or undecided target is an exit code
    raw["benchmark"] |= {"tolerance": 0.45, "rounds": 50, "processes": 5, "max_processes": 15, "runs_per_round": 10}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw), encoding="utf-8")
    # without GPUs accelerate launch starts several processes through MPI only, torchrun without it
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    command = [*launch, "ziplm_deploy", "run", str(tmp_path / "recipe.yaml")]
    for _ in range(2):  # the second time everything is there already
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        announced = [line for line in done.stderr.splitlines() if line.startswith("[1/") and not line.endswith("left")]
        assert len(announced) == 1  # one process speaks
    report = FamilyReport.load(tmp_path / "runs" / "tiny" / "report.json")
    for member in report.members[1:]:
        assert member.training is not None
        assert (member.training.steps, member.training.examples_per_step) == (4, 16)
    shutil.rmtree(tmp_path / "runs")
