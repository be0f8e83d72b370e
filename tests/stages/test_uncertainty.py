"""Which evaluation examples a file is compared on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.reports import benchmark_record, finished_run, int8_record
from ziplm_deploy.recipe import ModelConfig, Variant
from ziplm_deploy.stages import uncertainty
from ziplm_deploy.stages.uncertainty import unseen_by_choice, was_chosen
from ziplm_deploy.tasks import get_task
from ziplm_deploy.tasks.outcomes import Outcomes, halves
from ziplm_deploy.tasks.resampling import ResampledScores

TASK = get_task(ModelConfig(path="model", task="sentence-similarity"))


@pytest.mark.parametrize(
    ("record", "n"),
    [
        ({"n_choosing": 5, "scores": [0.8, 0.9]}, 5),
        ({"n_choosing": 5, "scores": [0.8]}, 5),  # the first form was taken because its score holds the budget
        ({"n_choosing": None, "scores": [0.8, 0.9]}, 10),
    ],
)
def test_an_int8_file_stands_beside_others_on_examples_that_did_not_choose_it(
    tmp_path: Path, record: dict[str, Any], n: int
) -> None:
    finished = finished_run(
        tmp_path, benchmark_record(**{"2x": 2.0, "4x": 4.0}), dict.fromkeys(("dense", "2x", "4x"), 0.8)
    )
    own, float32 = (finished.member("2x").file(variant) for variant in (Variant.INT8, Variant.FP32))
    own.int8_record.parent.mkdir(parents=True, exist_ok=True)
    int8_record(**record).save(own.int8_record)
    run: Any = SimpleNamespace(recipe=SimpleNamespace(seed=3))
    assert was_chosen(own) == (n == 5)
    found = unseen_by_choice(run, own, 10)
    resampled = ResampledScores(TASK, Outcomes({name: np.arange(10.0) for name in ("label", "predicted")}))
    assert resampled.on(found).n_examples == n
    if found is not None:
        assert found.tolist() == halves(10, 3)[1].tolist()
    assert unseen_by_choice(run, float32, 10) is None


def test_both_files_of_a_comparison_are_read_on_the_same_unseen_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncertainty, "int8_record", lambda file: int8_record(n_choosing=10, scores=[0.8, 0.9]))
    member = finished_run(
        tmp_path, benchmark_record(**{"2x": 2.0, "4x": 4.0}), dict.fromkeys(("dense", "2x", "4x"), 0.8)
    ).member("2x")
    run: Any = SimpleNamespace(recipe=SimpleNamespace(seed=3), task=TASK)
    labels = np.random.default_rng(0).normal(size=21)  # a reranker's rows would be more
    chooses, reports = halves(21, 3)
    predicted = labels.copy()
    predicted[chooses] = -labels[chooses]  # wrong where nothing may be read
    own, dense = (Outcomes({"label": labels, "predicted": each}) for each in (predicted, labels))
    found = uncertainty._of_file(
        run,
        _scored(member.file(Variant.INT8), own),
        _scored(member.file(Variant.FP32), dense),
        _scored(member.file(Variant.FP32), dense),
    )
    compared = found.of_dense[TASK.metric_name]
    assert (compared.n_examples, compared.difference) == (len(reports), 0.0)


def _scored(file: Any, outcomes: Outcomes) -> Any:
    return uncertainty._Scored(file, "hash", ResampledScores(TASK, outcomes, 3))
