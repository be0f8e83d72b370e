"""README's generated tables are current, and what it tells users to type exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from ziplm_deploy.cli.commands import app
from ziplm_deploy.recipe import parse_recipe, recipe_reference

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program that fills README, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("common", "summary"):
        sys.modules.pop(name, None)


def test_tables_are_current(tables: ModuleType) -> None:
    assert tables.fill(README) == README, "run: python benchmarks/readme_tables.py"


def test_recipe_reference_is_in_readme() -> None:
    assert recipe_reference() in README


@pytest.mark.parametrize("text", ["<!-- table:nothing -->\n<!-- end:nothing -->", "<!-- table:recipe -->\nno end"])
def test_wrong_markers_are_errors(tables: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="known"):
        tables.fill(text)


def test_every_command_in_readme_exists() -> None:
    commands = set(re.findall(r"ziplm-deploy ([a-z-]+)", README))
    assert {"run", "inspect", "profile", "prune", "export", "benchmark", "report", "doctor", "schema"} <= commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_every_recipe_in_readme_and_benchmarks_is_valid() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    blocks.append(yaml.safe_load((ROOT / "benchmarks" / "quickstart.yaml").read_text(encoding="utf-8")))
    assert len(blocks) >= 2
    whole = blocks[0]
    for block in blocks:
        parse_recipe(
            {
                **whole,
                **{
                    key: {**whole.get(key, {}), **value} if isinstance(value, dict) else value
                    for key, value in block.items()
                },
            }
        )


def test_files_that_readme_names_exist() -> None:
    for name in (
        "LICENSE",
        "benchmarks/quickstart.yaml",
        "benchmarks/readme_tables.py",
        "profiles/README.md",
        ".ci/run",
    ):
        assert (ROOT / name).exists()
