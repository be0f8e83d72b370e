"""A baseline's score less a member's, over the examples that both answered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.pipeline import recipe
from ziplm_deploy.baselines import BaselineRecord, BaselineScores
from ziplm_deploy.recipe import ModelConfig, Variant
from ziplm_deploy.run.baseline import BaselineFiles
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.run.member import ModelFile
from ziplm_deploy.stages.gains import baseline_scores, compare_with_baselines
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.record import Scores

N = 400
INT8 = "onnxruntime-int8"


def score(file: ModelFile | BaselineFiles, n_right: int, examples: str = "these rows") -> None:
    """Let the first ``n_right`` examples be answered rightly."""
    file.outcomes.parent.mkdir(parents=True, exist_ok=True)
    predicted = (np.arange(N) >= n_right).astype(np.int64)
    outcomes_hash = Outcomes({"label": np.zeros(N, np.int64), "predicted": predicted}).save(file.outcomes)
    Scores(
        metric="accuracy",
        scores={"accuracy": n_right / N},
        n_rows=N,
        engine="onnxruntime",
        engine_version="1.0",
        examples=examples,
        outcomes_hash=outcomes_hash,
    ).save(file.scores)


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """A run with a baseline that answers 360 of 400 rightly, and one that answers as the dense model: 380."""
    folder = RunFolder(recipe(tmp_path, benchmark={"baselines": [INT8, "torch"]}))
    found = SimpleNamespace(
        recipe=folder._recipe,
        folder=folder,
        dense_member=folder.dense_member,
        task=get_task(ModelConfig(path="some/model", task="text-classification")),
        data=SimpleNamespace(evaluation_rows_key="these rows"),
    )
    for name in (INT8, "torch"):
        files = BaselineFiles(name, folder.path)
        for path in files.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        BaselineRecord(tool="a tool", settings="").save(files.record)
    score(BaselineFiles(INT8, folder.path), 360)
    score(folder.dense_member.file(Variant.FP32), 380)
    return found


def compared(run: SimpleNamespace) -> BaselineScores:
    """The member 2x beside the baselines, as the evaluation leaves it."""
    files = [run.dense_member.file(Variant.FP32), run.folder.member(2.0).file(Variant.FP32)]
    compare_with_baselines(run, files)  # type: ignore[arg-type]
    return baseline_scores(run)  # type: ignore[arg-type]


def test_the_interval_is_that_of_the_paired_difference(run: SimpleNamespace) -> None:
    score(run.folder.member(2.0).file(Variant.FP32), 340)
    found = compared(run).gains
    assert set(found) == {"2x"}  # the dense model itself is judged beside nothing
    assert set(found["2x"]) == {INT8, "torch"}
    # 20 and 40 of 400 examples are answered by the baseline alone; with one example more for each side
    # (Bonett and Price, 2012), a proportion p of n + 2 with the interval p ± 1.96 √((a + b - (a - b)²) / (n + 2))
    for name, alone in ((INT8, 20), ("torch", 40)):
        a, b, n = alone + 1, 1, N + 2
        half = 1.96 * np.sqrt(((a + b) / n - ((a - b) / n) ** 2) / n)
        found_interval = (found["2x"][name].low, found["2x"][name].high)
        assert found_interval == pytest.approx(((a - b) / n - half, (a - b) / n + half), abs=0.006)


def test_a_better_member_loses_to_nobody(run: SimpleNamespace) -> None:
    score(run.folder.member(2.0).file(Variant.FP32), 395)
    assert compared(run).gains["2x"][INT8].high < 0


def test_equal_answers_are_not_told_apart(run: SimpleNamespace) -> None:
    score(run.folder.member(2.0).file(Variant.FP32), 360)
    gain = compared(run).gains["2x"][INT8]
    assert gain.low < 0 < gain.high


def test_other_examples_compare_with_nothing(run: SimpleNamespace) -> None:
    score(run.folder.member(2.0).file(Variant.FP32), 340, examples="other rows")
    assert compared(run).gains == {}


def test_scores_of_baselines_have_intervals_beside_the_dense_model_too(run: SimpleNamespace) -> None:
    score(run.folder.member(2.0).file(Variant.FP32), 340)
    found = compared(run).baselines
    low, high = found[INT8].intervals["accuracy"]
    assert low < 0.9 < high
    assert found[INT8].of_dense["accuracy"].high < 0
    assert found["torch"].of_dense == {}  # it answers as the dense model does


def test_without_baselines_nothing_is_left(run: SimpleNamespace) -> None:
    score(run.folder.member(2.0).file(Variant.FP32), 340)
    assert compared(run).gains
    for name in (INT8, "torch"):
        BaselineFiles(name, run.folder.path).record.unlink()
    assert compared(run) == BaselineScores(baselines={}, gains={})
