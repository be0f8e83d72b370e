"""Commands: options, exit codes, messages. The stages themselves are replaced; test_pipeline runs them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import invoke, replace, write_recipe
from tests.helpers.onnx_models import write_mlp
from tests.helpers.reports import benchmark_record, family_report, latency_table, member, plan
from ziplm_deploy import api
from ziplm_deploy.baselines import BASELINES
from ziplm_deploy.cli import console
from ziplm_deploy.cli.app import Terminated
from ziplm_deploy.errors import DataError, EngineError, TargetUnreachableError, ZipLMError
from ziplm_deploy.latency import benchmark as benchmarking
from ziplm_deploy.latency.benchmark import TimedFile
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_run_prints_the_table_and_where_everything_is(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "run_recipe", family_report())
    result = invoke("run", recipe)
    assert result.exit_code == 0
    for wanted in ("dense", "2.00x [1.99, 2.01]", "0.8640", "runs/demo/2x", "report.md"):
        assert wanted in result.stdout


def test_run_takes_options_over_the_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = replace(monkeypatch, "run_recipe", family_report())
    options = ("--speedups", "3, 1.5", "-o", tmp_path / "other", "--seed", "5", "--threads", "2", "--quiet")
    assert invoke("run", recipe, *options).exit_code == 0
    (used,) = seen
    assert used.speedups == (1.5, 3.0)
    assert used.run_dir == tmp_path / "other" / "demo"
    assert used.seed == 5
    assert (used.environment.threads, used.environment.workload.seq_len, used.environment.workload.batch_size) == (
        2,
        32,
        2,
    )


def test_json_is_one_document_on_stdout(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "run_recipe", family_report())
    printed = json.loads(invoke("run", recipe, "--json").stdout)
    assert printed["kind"] == "family_report"
    assert [item["name"] for item in printed["members"]] == ["dense", "2x"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missed_target_is_exit_3_after_the_report(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    missed = member("2x", measured_speedup=1.7, verdict="missed", reason="too slow a machine")
    replace(monkeypatch, "run_recipe", family_report(member("dense"), missed))
    result = invoke("run", recipe, *(["--json"] if as_json else []))
    assert result.exit_code == 3
    assert "missed: 2x measured 1.70x: too slow a machine" in result.stderr
    assert "2x" in result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZipLMError("expected a, found b"), 1),
        (DataError("expected a, found b"), 2),
        (EngineError("expected a, found b"), 1),
        (TargetUnreachableError("expected a, found b", 2.5), 3),
    ],
)
def test_errors_are_one_message_and_their_exit_code(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, error: ZipLMError, code: int
) -> None:
    replace(monkeypatch, "run_recipe", error)
    result = invoke("run", recipe)
    assert result.exit_code == code
    assert result.stderr.strip().endswith("error: expected a, found b")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_end_from_outside_says_how_to_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, signal: type[KeyboardInterrupt], code: int
) -> None:
    replace(monkeypatch, "run_recipe", signal())
    result = invoke("run", recipe)
    assert result.exit_code == code
    assert "nothing half-written is left; the same command continues where it was" in result.stderr


def test_benchmark_again_is_for_recipes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def benchmark(recipe: Recipe, progress: Any, *, again: bool) -> BenchmarkRecord:
        asked.append(again)
        return benchmark_record(**{"2x": 2.0})

    monkeypatch.setattr(api, "benchmark", benchmark)
    for arguments in ((), ("--again",)):
        assert invoke("benchmark", recipe, *arguments).exit_code == 0
    assert asked == [False, True]
    (tmp_path / "a.onnx").write_bytes(b"onnx")
    refused = invoke("benchmark", tmp_path / "a.onnx", "--again")
    assert refused.exit_code == 2
    assert "expected --again with a recipe" in refused.stderr


def test_a_full_disk_is_a_message(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "run_recipe", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights"))
    result = invoke("run", recipe)
    assert result.exit_code == 1
    assert "expected free disk space for weights" in result.stderr


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ZeroDivisionError("bug")])
def test_unexpected_exceptions_keep_their_traceback(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    replace(monkeypatch, "run_recipe", error)
    result = invoke("run", recipe)
    assert result.exit_code == 1
    assert result.exception is error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "none.yaml"), "expected a recipe at none.yaml, found no file"),
        (("profile", "none.yaml"), "none.yaml"),
        (("report", "model.onnx"), "expected a recipe (YAML), found model.onnx"),
        (("benchmark", "a.onnx"), "expected an ONNX file at a.onnx"),
        (("benchmark", "a.yaml", "b.yaml"), "expected one recipe or ONNX files"),
        (("benchmark", "a.yaml", "b.onnx"), "expected only ONNX files"),
        (("inspect", "./none"), "found no folder"),
        (("inspect", "package:no_such_package"), "pip install no-such-package"),
        (("schema", "html"), "found 'html'"),
        (("frobnicate",), "frobnicate"),
        (("run",), "RECIPE"),
        (("run", "r.yaml", "--seed", "x"), "--seed"),
        (("run", "r.yaml", "--frobnicate"), "--frobnicate"),
    ],
)
def test_wrong_usage_is_exit_2_and_named(arguments: tuple[str, ...], named: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr


@pytest.mark.parametrize("speedups", ["1", "0.5", "fast", "", "2,,3", "-2"])
def test_wrong_speedups_are_exit_2(recipe: Path, monkeypatch: pytest.MonkeyPatch, speedups: str) -> None:
    seen = replace(monkeypatch, "run_recipe", family_report())
    result = invoke("run", recipe, f"--speedups={speedups}")
    assert result.exit_code == 2
    assert "speedups" in result.stderr
    assert not seen


def test_bad_usage_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    invoke("run", recipe, "--speedups", "1")
    invoke("run", recipe, "--threads", "0")
    invoke("report", recipe)
    assert not (tmp_path / "runs").exists()


def test_report_before_benchmark_says_what_to_run(recipe: Path) -> None:
    result = invoke("report", recipe)
    assert result.exit_code == 1
    assert "ziplm-deploy benchmark" in result.stderr


def test_stage_commands_say_what_they_made(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_file = tmp_path / "model.onnx"
    onnx_file.write_bytes(b"x" * 2_000_000)
    replace(monkeypatch, "profile", latency_table())
    replace(monkeypatch, "prune", {"2x": plan(2.0)})
    replace(monkeypatch, "export", {"2x": onnx_file})
    replace(monkeypatch, "benchmark", benchmark_record(**{"2x": 2.01}))
    for command, wanted in (
        ("profile", "6 cells in 2 s, dense 10.00 ms"),
        ("prune", "2x: predicted 2.02x"),
        ("export", "2x: 2.0 MB"),
        ("benchmark", "2.010x [2.000, 2.020]"),
    ):
        result = invoke(command, recipe)
        assert result.exit_code == 0, result.stderr
        assert wanted in result.stdout


def test_benchmark_of_onnx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"]
    for path in files:
        path.parent.mkdir()
        path.write_bytes(b"onnx")
    seen: dict[str, Any] = {}

    def compare(models: Any, environment: Any, config: Any, baseline: str, *_: Any, **__: Any) -> BenchmarkRecord:
        seen.update(models=models, environment=environment, config=config, baseline=baseline)
        return benchmark_record(**{"b": 2.0})

    monkeypatch.setattr(benchmarking, "compare", compare)
    options = ("--batch-size", 4, "--seq-len", 64, "--threads", 2, "--rounds", 7, "-o", tmp_path / "r.json", "--json")
    result = invoke("benchmark", *files, *options)
    assert result.exit_code == 0, result.stderr
    memory = machine_info().memory_bytes
    assert seen["models"] == {
        name: TimedFile(path, "onnxruntime", memory) for name, path in zip("ab", files, strict=True)
    }
    assert seen["baseline"] == "a"
    environment = seen["environment"]
    assert (environment.workload.batch_size, environment.workload.seq_len, environment.threads) == (4, 64, 2)
    assert seen["config"].rounds == 7
    assert BenchmarkRecord.load(tmp_path / "r.json").variant("b").speedup == 2.0
    assert len(json.loads(result.stdout)["variants"]) == 2


def test_benchmark_on_several_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_mlp(tmp_path / "A.onnx", 8, batch=1, tokens=32), write_mlp(tmp_path / "B.onnx", 8)]
    seen: dict[str, Any] = {}

    def compare(models: Any, environment: Any, config: Any, baseline: str, *_: Any, **__: Any) -> BenchmarkRecord:
        seen.update(models=models, environment=environment, baseline=baseline)
        return benchmark_record(**{"b": 2.0})

    monkeypatch.setattr(benchmarking, "compare", compare)
    engines = ("--engine", "openvino", "--engine", "onnxruntime", "--engine", "openvino")
    result = invoke("benchmark", *files, *engines, "--seq-len", 32, "--memory-limit", 2, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert seen["models"] == {
        "A (openvino)": TimedFile(files[0], "openvino", 2**31),
        "B (openvino)": TimedFile(files[1], "openvino", 2**31),
        "A (onnxruntime)": TimedFile(files[0], "onnxruntime", 2**31),
        "B (onnxruntime)": TimedFile(files[1], "onnxruntime", 2**31),
    }
    assert seen["baseline"] == "A (openvino)"
    assert seen["environment"].engine == "openvino"


def test_benchmark_prints_the_engine_of_every_file() -> None:
    record = benchmark_record(**{"2x": 2.0})
    own = {"engine": "openvino", "engine_version": "2026.4"}
    record.variants[1] = record.variants[1].model_copy(update=own)
    with CliRunner().isolation() as (out, *_):
        console.print_benchmark(record)
        printed = out.getvalue().decode()
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in printed.splitlines() if "│" in line}
    assert rows == {"dense": "onnxruntime 1.0", "2x": "openvino 2026.4"}
    assert "batch 1, 128 tokens, 1 thread(s)" in printed


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "a.onnx", 8)
    result = invoke("benchmark", path, "--engine", "onnxruntime", "--engine", "tensorrt")
    assert result.exit_code == 2
    assert "--engine: Input should be 'deepsparse', 'llamacpp', 'onnxruntime' or 'openvino'" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--batch-size", 0), ("--seq-len", 1), ("--threads", -1), ("--rounds", 1)]
)
def test_benchmark_options_out_of_range(tmp_path: Path, option: str, value: int) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"onnx")
    result = invoke("benchmark", path, option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"not an onnx file")
    result = invoke("benchmark", path, "--quiet")
    assert result.exit_code == 1
    assert "a.onnx" in result.stderr
    assert result.stderr.startswith("error: ")


def test_doctor_examines_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.cli import doctor

    monkeypatch.setattr(doctor, "ROUNDS", 5)
    findings = doctor.examine(rounds=5)
    versions = {engine["name"]: engine["version"] for engine in findings["engines"]}
    assert versions["onnxruntime"]
    assert findings["noise"]["aa_low"] <= findings["noise"]["aa_ratio"] <= findings["noise"]["aa_high"]
    monkeypatch.setattr(doctor, "examine", lambda note: findings)
    printed = invoke("doctor").stdout
    tools = {baseline["name"]: baseline["tool"] for baseline in findings["baselines"]}
    assert set(tools) == set(BASELINES)
    assert tools["torch"]
    for wanted in (
        "baseline torch (dense float32 in torch): made by torch",
        "CPU:",
        "instruction sets:",
        "granted",
        "engine onnxruntime: version",
        "noise: one model",
    ):
        assert wanted in printed
    assert json.loads(invoke("doctor", "--json").stdout) == findings


def test_doctor_without_an_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ziplm_deploy.cli import console, doctor
    from ziplm_deploy.engines import Engine

    def missing(self: Engine) -> str:
        raise EngineError("not installed; run: pip install onnxruntime")

    monkeypatch.setattr(Engine, "version", missing)
    findings = doctor.examine(rounds=5)
    console.print_findings(findings)
    assert "missing: not installed; run: pip install onnxruntime" in capsys.readouterr().out


def test_schema_and_reference_are_printed() -> None:
    assert json.loads(invoke("schema", "report").stdout)["title"] == "FamilyReport"
    assert "environment.threads" in invoke("recipe-reference").stdout


def test_help_is_quick() -> None:
    code = "import sys; sys.argv = ['ziplm-deploy', '--help']; from ziplm_deploy.cli.commands import main; main()"
    seconds = []
    for _ in range(3):
        began = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = os.times()
        assert done.returncode == 0
        assert "benchmark" in done.stdout
        seconds.append(after.children_user - began.children_user)
    assert min(seconds) < 3  # CPU seconds, so that a busy machine does not fail it; torch alone takes more
