"""Commands with their stages replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ziplm_deploy import api
from ziplm_deploy.cli.commands import app
from ziplm_deploy.recipe import Recipe


def write_recipe(folder: Path) -> Path:
    path = folder / "r.yaml"
    path.write_text(
        f"name: demo\noutput_dir: {folder / 'runs'}\nmodel: {{path: m, task: fill-mask}}\n"
        "environment: {workload: {seq_len: 32, batch_size: 2}}\nspeedups: [2]\n",
        encoding="utf-8",
    )
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def replace(monkeypatch: pytest.MonkeyPatch, name: str, outcome: Any) -> list[Recipe]:
    """Make a stage return ``outcome``, or raise it; returns the recipes that it is called with."""
    seen: list[Recipe] = []

    def stage(recipe: Recipe, progress: Any = None, **options: Any) -> Any:
        seen.append(recipe)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(api, name, stage)
    return seen
