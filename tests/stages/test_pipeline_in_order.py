"""A run whose members are pruned in order, by a method that always is: files, notes and report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pipeline import causal_recipe, save_causal, written_again
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.reporting.records import FamilyReport

pytestmark = pytest.mark.transformers


@pytest.mark.slow
def test_a_causal_model_by_slimgpt(tmp_path: Path) -> None:
    save_causal(tmp_path)
    recipe = parse_recipe(causal_recipe(tmp_path, prune={"method": "slimgpt"}, speedups=[1.3]))
    run_pipeline(recipe)
    run_dir = tmp_path / "runs" / "tiny"
    plan = PruningPlan.load(run_dir / "pruning" / "1.3x.json")
    assert plan.exchanged_fraction is not None
    kept = load(run_dir / "1.3x").ziplm_kept
    assert {name: len(structures) for name, structures in kept.items()} == plan.sizes
    report = FamilyReport.load(run_dir / "report.json")
    assert [member.exchanged_fraction for member in report.members] == [None, plan.exchanged_fraction]
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "## Pruned in order" in text
    assert f"| 1.3x | {plan.exchanged_fraction:.1%} |" in text
    again = written_again(tmp_path, recipe)
    assert not {name for name in again if name.startswith(("pruning", "1.3x/pruned", "1.3x/model"))}
