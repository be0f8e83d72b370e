"""Engines in environments of their own: found, missing, half-made, of the wrong Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ziplm_deploy.cli import app
from ziplm_deploy.config import parse_recipe
from ziplm_deploy.engines import get_engine
from ziplm_deploy.engines.side import MARKER, SideEnvironment, quiet_environment
from ziplm_deploy.errors import EngineError, EnvironmentMismatchError, RecipeError

HERE = (sys.version_info[0], sys.version_info[1])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ZIPLM_DEEPSPARSE_PYTHON", raising=False)
    return tmp_path


def environment(engine: str, *packages: str, pythons: tuple[tuple[int, int], ...] = (HERE,)) -> SideEnvironment:
    return SideEnvironment(engine, pythons, packages, "a notice")


def test_an_engine_that_is_not_set_up_names_the_command() -> None:
    for ask in (get_engine("deepsparse").version, get_engine("deepsparse").interpreter):
        with pytest.raises(EngineError, match="not set up; run: ziplm-deploy setup deepsparse"):
            ask()


def test_a_half_made_environment_is_not_used(cache: Path) -> None:
    (cache / "ziplm-deploy" / "deepsparse" / "bin").mkdir(parents=True)
    with pytest.raises(EngineError, match="set-up was interrupted; run: ziplm-deploy setup deepsparse"):
        get_engine("deepsparse").version()


def test_another_interpreter_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = environment("pytest")
    monkeypatch.setenv("ZIPLM_PYTEST_PYTHON", sys.executable)
    assert made.interpreter() == sys.executable
    assert made.version() == pytest.__version__
    monkeypatch.setenv("ZIPLM_PYTEST_PYTHON", "/no/such/python")
    with pytest.raises(EngineError, match="in ZIPLM_PYTEST_PYTHON, found '/no/such/python'"):
        made.interpreter()


def test_the_named_interpreter_must_have_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPLM_DEEPSPARSE_PYTHON", sys.executable)
    with pytest.raises(EngineError, match="expected deepsparse in"):
        get_engine("deepsparse").version()


def test_an_environment_is_made_and_marked_only_when_the_engine_can_be_imported(cache: Path) -> None:
    good, bad = environment("json", "pip"), environment("no_such_engine", "pip")
    assert Path(good.create()).is_file()
    assert good.interpreter().startswith(str(cache))
    assert (good.folder / MARKER).is_file()
    with pytest.raises(EngineError, match="No module named 'no_such_engine'"):
        bad.create()
    with pytest.raises(EngineError, match="set-up was interrupted"):
        bad.interpreter()


def test_packages_that_cannot_be_installed_are_an_error() -> None:
    with pytest.raises(EngineError, match="expected to set up json"):
        environment("json", "./no-such-package").create()


@pytest.mark.parametrize("python", [None, sys.executable, "/no/such/python"])
def test_an_unsupported_python_is_refused(python: str | None) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"expected (Python 2\.7|a Python interpreter)"):
        environment("json", pythons=((2, 7),)).create(python)


def test_analytics_are_off() -> None:
    assert quiet_environment()["NM_DISABLE_ANALYTICS"] == "1"


def test_only_engines_that_need_it_are_set_up() -> None:
    done = CliRunner().invoke(app, ["setup", "onnxruntime"])
    assert done.exit_code == 2
    assert "needs a set-up: deepsparse, found 'onnxruntime'" in done.output


@pytest.mark.parametrize("export", [{}, {"shapes": "static"}, {"opset": 16}])
def test_deepsparse_takes_static_shapes_and_old_opsets_only(export: dict[str, object]) -> None:
    raw: dict[str, object] = {"name": "x", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}
    raw["environment"] = {"engine": "deepsparse"}
    with pytest.raises(RecipeError, match=r"export\.shapes: static and export\.opset: 16"):
        parse_recipe({**raw, "export": export})
    parse_recipe({**raw, "export": {"shapes": "static", "opset": 16}})
