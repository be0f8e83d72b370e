"""INT8 files of a whole run on a tiny model: who chooses, what is measured once, and what is not run again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.models import save_dense
from tests.helpers.pipeline import recipe, write_rows
from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.compression.records import Int8Record, LinearRanking
from ziplm_deploy.documents import read_json
from ziplm_deploy.engines import runner as engine_runner
from ziplm_deploy.pipeline import run_pipeline as run
from ziplm_deploy.recipe import Variant
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.tasks.outcomes import halves

pytestmark = pytest.mark.slow
COMPRESS = {"variants": ["int8", "sparse", "sparse-int8"], "int8": {"n_calibration": 16}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and a finished run of one member with every variant."""
    folder = tmp_path_factory.mktemp("int8")
    save_dense(folder / "model", task="text-classification")
    write_rows(folder / "train.jsonl", 64, 0)
    write_rows(folder / "test.jsonl", 30, 1)
    run(recipe(folder, compress=COMPRESS))
    return folder


def test_one_half_of_the_examples_chooses(made: Path) -> None:
    folder = made / "runs" / "tiny"
    choosing, others = halves(30, seed=0)
    for name in ("dense", "1.5x"):
        for variant in (Variant.INT8, Variant.SPARSE_INT8):
            record = Int8Record.load(folder / "compression" / name / f"{variant}.json")
            outcomes = read_json(folder / name / variant.outcomes_file)["arrays"]
            right = np.array(outcomes["label"]) == np.array(outcomes["predicted"])
            chosen = record.scores[-1] if record.within_budget else max(record.scores)
            assert right[choosing].mean() == pytest.approx(chosen)
            assert right.mean() == pytest.approx(record.whole_score)
            assert record.n_choosing == len(choosing) == len(others)
    facts = [file.facts for each in FamilyReport.load(folder / "report.json").members for file in each.files]
    assert all(re.fullmatch(r"\d looks? at 15 examples", each["chosen by"]) for each in facts if "INT8" in each)
    assert "looks at 15 examples" in (folder / "1.5x" / "README.md").read_text(encoding="utf-8").replace(
        "look ", "looks "
    )


def test_linears_are_ranked_once_for_both_int8_files(made: Path, tmp_path: Path) -> None:
    folder = made / "runs" / "tiny" / "compression" / "1.5x"
    plain, sparse = (Int8Record.load(folder / f"{name}.json").sensitivities for name in ("int8", "sparse-int8"))
    assert plain == sparse == LinearRanking.load(folder / "linears.json").linears
    manifest = read_json(made / "runs" / "tiny" / "manifest.json")
    assert [stage for stage in manifest["stages"] if stage.startswith("rank")] == [
        "rank linears dense",
        "rank linears 1.5x",
    ]


def test_files_that_the_budget_scored_are_not_run_again(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is loaded for its answers once in a run; where all scores are current, none is."""
    shutil.copytree(made / "runs" / "tiny", tmp_path / "tiny")
    for path in [*(tmp_path / "tiny").rglob("accuracy*.json"), *(tmp_path / "tiny").rglob("int8.json")]:
        path.unlink()
    opened: list[str] = []
    runner = engine_runner.onnx_runner

    def noting(path: Path) -> Any:
        opened.append(file_hash(path))
        return runner(path)

    monkeypatch.setattr(engine_runner, "onnx_runner", noting)
    settings = recipe(made, compress=COMPRESS, output_dir=str(tmp_path))
    run(settings)
    answered = {
        file_hash(path) for path in (tmp_path / "tiny").rglob("*/model*.onnx") if path.parent.name in ("dense", "1.5x")
    }
    assert answered <= set(opened)
    assert len(opened) == len(set(opened))
    opened.clear()
    run(settings)
    assert opened == []
