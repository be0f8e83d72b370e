"""Engines and tools in environments of their own: found, missing, half-made, of the wrong Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.reports import machine
from ziplm_deploy.cli.commands import app
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import EngineError, EnvironmentMismatchError, RecipeError, StorageError
from ziplm_deploy.machine import side_environments
from ziplm_deploy.machine.locks import FileLock
from ziplm_deploy.machine.side_environments import (
    ENVIRONMENTS,
    MARKER,
    NEURAL_COMPRESSOR,
    SideEnvironment,
    quiet_environment,
)
from ziplm_deploy.recipe import parse_recipe

DEEPSPARSE_BASELINE: dict[str, object] = {"benchmark": {"baseline_engine": "deepsparse"}}
HERE = (sys.version_info[0], sys.version_info[1])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for known in ENVIRONMENTS.values():
        monkeypatch.delenv(known.variable, raising=False)
    return tmp_path


def environment(name: str, *packages: str, pythons: tuple[tuple[int, int], ...] = (HERE,)) -> SideEnvironment:
    return SideEnvironment(name, pythons, packages, "a notice")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_is_not_set_up_names_the_command(name: str) -> None:
    for ask in (ENVIRONMENTS[name].version, ENVIRONMENTS[name].interpreter):
        with pytest.raises(EngineError, match=f"expected {name}, found it not set up; run: ziplm-deploy setup {name}"):
            ask()


def test_an_engine_asks_its_environment() -> None:
    for ask in (get_engine("deepsparse").version, get_engine("deepsparse").interpreter):
        with pytest.raises(EngineError, match="run: ziplm-deploy setup deepsparse"):
            ask()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_half_made_environment_is_not_used(cache: Path, name: str) -> None:
    (cache / "ziplm-deploy" / name / "bin").mkdir(parents=True)
    with pytest.raises(EngineError, match=f"set-up was interrupted; run: ziplm-deploy setup {name}"):
        ENVIRONMENTS[name].version()


def test_another_interpreter_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = environment("pytest")
    monkeypatch.setenv("ZIPLM_PYTEST_PYTHON", sys.executable)
    assert made.interpreter() == sys.executable
    assert made.version() == pytest.__version__
    monkeypatch.setenv("ZIPLM_PYTEST_PYTHON", "/no/such/python")
    with pytest.raises(EngineError, match="in ZIPLM_PYTEST_PYTHON, found '/no/such/python'"):
        made.interpreter()


def counting(program: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Path:
    """An interpreter for ``environment("json")``; each start of it is a line of the file that is returned."""
    starts = program.with_suffix(".starts")
    program.write_text("\n".join(["#!/bin/sh", f"echo start >> {starts}", *lines]) + "\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("ZIPLM_JSON_PYTHON", str(program))
    return starts


def test_a_version_is_asked_for_once_a_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = counting(cache / "python", monkeypatch, "echo 1.2")
    assert [environment("json").version() for _ in range(3)] == ["1.2"] * 3
    assert starts.read_text().count("start") == 1
    counting(cache / "python", monkeypatch, "echo 1.3")
    monkeypatch.setattr(SideEnvironment, "_run", lambda self, command: None)
    environment("json").create()  # what was installed anew is asked for anew
    assert environment("json").version() == "1.3"


def test_a_version_that_was_not_found_is_asked_for_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(cache / "python", monkeypatch, "echo No package >&2", "exit 1")
    with pytest.raises(EngineError, match="found: No package; run: ziplm-deploy setup json"):
        environment("json").version()
    counting(cache / "python", monkeypatch, "echo 2.0")
    assert environment("json").version() == "2.0"


def test_an_interpreter_that_hangs_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_environments, "VERSION_SECONDS", 0.5)
    counting(cache / "python", monkeypatch, "exec sleep 30")
    with pytest.raises(EngineError, match=r"timed out after 0\.5 seconds; run: ziplm-deploy setup json"):
        environment("json").version()


def test_variables_have_no_hyphens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPLM_NEURAL_COMPRESSOR_PYTHON", sys.executable)
    assert NEURAL_COMPRESSOR.interpreter() == sys.executable


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_named_interpreter_must_have_the_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(ENVIRONMENTS[name].variable, sys.executable)
    with pytest.raises(EngineError, match=f"expected {name} in"):
        ENVIRONMENTS[name].version()


@pytest.mark.slow
def test_an_environment_is_made_when_the_package_can_be_imported_and_stays_until_the_next_one_is(cache: Path) -> None:
    good, bad = environment("json", "pip"), environment("no_such_engine", "pip")
    assert Path(good.create()).is_file()
    assert good.interpreter().startswith(str(cache))
    assert (good.folder / MARKER).is_file()
    with pytest.raises(EngineError, match="No module named 'no_such_engine'"):
        bad.create()
    with pytest.raises(EngineError, match="found it not set up"):
        bad.interpreter()
    assert sorted(path.name for path in good.folder.parent.iterdir() if path.is_dir()) == ["json"]
    before = (good.folder / MARKER).stat().st_mtime_ns
    with pytest.raises(EngineError, match="expected to set up json"):
        environment("json", "./no-such-package").create()
    assert (good.folder / MARKER).stat().st_mtime_ns == before
    assert subprocess.run([good.interpreter(), "-c", "import json, pip"], check=True).returncode == 0
    good.create()
    assert (good.folder / MARKER).stat().st_mtime_ns > before


def test_two_set_ups_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = environment("json", "pip")
    made.folder.parent.mkdir(parents=True)
    other = FileLock(made.folder.with_name(".json.lock"))
    assert other.acquire()
    with pytest.raises(EngineError, match=r"found another set-up of it at work \(process \d+"):
        made.create()
    other.release()
    monkeypatch.setattr(SideEnvironment, "_run", lambda self, command: None)
    made.create()


@pytest.mark.parametrize("python", [None, sys.executable, "/no/such/python"])
def test_an_unsupported_python_is_refused(python: str | None) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"expected (Python 2\.7|a Python interpreter)"):
        environment("json", pythons=((2, 7),)).create(python)


@pytest.mark.parametrize("answer", ["-c import sys", "", "3.11", "3 11 0", "\\377"])
def test_a_program_that_is_no_python_is_refused(cache: Path, answer: str) -> None:
    program = cache / "program"
    program.write_text(f"#!/bin/sh\nprintf '%b' '{answer}'\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(EnvironmentMismatchError, match=r"found a program that answers .*with --python"):
        environment("json").create(str(program))


@pytest.mark.parametrize("variable", ["NM_DISABLE_ANALYTICS", "ORT_DISABLE_TELEMETRY"])
def test_analytics_are_off(variable: str) -> None:
    assert quiet_environment()[variable] == "1"


def test_only_what_needs_it_is_set_up() -> None:
    done = CliRunner().invoke(app, ["setup", "onnxruntime"])
    assert done.exit_code == 2
    assert "needs a set-up: deepsparse or neural-compressor, found 'onnxruntime'" in done.output


def test_setup_makes_the_environment_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def create(made: SideEnvironment, python: str | None = None) -> str:
        asked.append((made.name, python))
        return "/there/bin/python"

    monkeypatch.setattr(SideEnvironment, "create", create)
    monkeypatch.setattr(SideEnvironment, "version", lambda made, python: "2.6")
    monkeypatch.setenv(NEURAL_COMPRESSOR.variable, "/other/python")
    done = CliRunner().invoke(app, ["setup", "neural-compressor", "--python", "python3.11"])
    assert done.exit_code == 0
    assert asked == [("neural-compressor", "python3.11")]
    assert "neural-compressor 2.6: /there/bin/python" in done.output
    assert NEURAL_COMPRESSOR.notice in done.output
    assert f"{NEURAL_COMPRESSOR.variable} names another Python" in done.output


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        environment("json").create()


def test_a_cpu_that_deepsparse_was_not_built_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = machine().model_copy(update={"isa_flags": ("sse4_2", "avx")})
    monkeypatch.setattr("ziplm_deploy.engines.base.machine_info", lambda: old)
    with pytest.raises(EngineError, match="expected a CPU with AVX2"):
        get_engine("deepsparse").version()
    monkeypatch.setattr("ziplm_deploy.machine.info.machine_info", lambda: old)
    monkeypatch.setattr(SideEnvironment, "create", lambda made, python: pytest.fail("nothing can be made for it"))
    done = CliRunner().invoke(app, ["setup", "deepsparse"])
    assert done.exit_code == 1
    assert "sse4_2 avx; use engine onnxruntime" in done.output


def test_doctor_lists_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplm_deploy.cli import doctor

    monkeypatch.setattr(doctor, "measure_noise", lambda rounds, note: {})
    [tool] = doctor.examine()["tools"]
    assert tool["name"] == "neural-compressor"
    assert tool["version"] is None
    assert "run: ziplm-deploy setup neural-compressor" in tool["missing"]
    monkeypatch.setattr(SideEnvironment, "version", lambda made: "2.6")
    [tool] = doctor.examine()["tools"]
    assert (tool["version"], tool["missing"], tool["notice"]) == ("2.6", "", NEURAL_COMPRESSOR.notice)


@pytest.mark.parametrize("where", [{"environment": {"engine": "deepsparse"}}, DEEPSPARSE_BASELINE])
@pytest.mark.parametrize("export", [{}, {"shapes": "static"}, {"opset": 16}])
def test_deepsparse_takes_static_shapes_and_old_opsets_only(
    export: dict[str, object], where: dict[str, object]
) -> None:
    raw: dict[str, object] = {"name": "x", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2], **where}
    with pytest.raises(RecipeError, match=r"export\.shapes: static and export\.opset: 16"):
        parse_recipe({**raw, "export": export})
    parse_recipe({**raw, "export": {"shapes": "static", "opset": 16}})
