"""Runs that are killed go on to what an undisturbed run makes; the program in ``benchmarks`` kills many more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.stages.checks import check_task

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import robustness_recipes as recipes  # noqa: E402


@pytest.mark.parametrize("mode", recipes.MODES)
def test_recipes_of_runs_that_are_killed_are_valid(tmp_path: Path, mode: str) -> None:
    recipe = parse_recipe(recipes.prepared(tmp_path, mode))
    assert recipe.speedups
    check_task(recipe)


def test_stages_of_different_members_are_one_kind() -> None:
    stages = ["evaluate 1.4x sparse", "evaluate dense sparse", "evaluate pruned 1.8x", "train dense", "benchmark"]
    assert [recipes.kind_of(stage) for stage in stages] == [
        *("evaluate * sparse", "evaluate * sparse", "evaluate pruned *", "train *", "benchmark")
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_go_on_and_a_second_run_is_refused(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "robustness.py"), "--only", "kills", "--output", str(result)]
    subprocess.run([*command, "--kills", "3", "--pairs", "1", "--modes", "recovery"], cwd=ROOT, check=False)
    figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
    assert {name: figures[name]["value"] for name in ("kill_differences", "pairs")} == {
        "kill_differences": 0,
        "pairs": 1,
    }
    assert figures["kills"]["value"] >= 1
