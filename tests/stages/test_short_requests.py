"""Speedups on requests as short as most evaluation texts, beside those of the workload."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import ziplm_deploy
from tests.helpers.models import save_dense
from tests.helpers.pipeline import recipe, write_rows
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Environment, Recipe, parse_recipe
from ziplm_deploy.reporting.table import aa_line
from ziplm_deploy.stages.benchmark import short_requests
from ziplm_deploy.tasks.lengths import TokenLengths


def run_of(given: Recipe, median: int) -> SimpleNamespace:
    lengths = TokenLengths(key="k", examples=9, median=median, p90=median, longest=40, limit=32, cut=1)
    return SimpleNamespace(recipe=given, folder=SimpleNamespace(lengths={"evaluation": lengths}))


@pytest.mark.parametrize(
    ("median", "changes", "tokens"),
    [
        (9, {}, 9),
        (2, {}, 4),
        (24, {}, None),
        (9, {"benchmark": {"median_length": False}}, None),
        (9, {"export": {"shapes": "static"}}, None),
    ],
)
def test_when_short_requests_are_timed(
    tmp_path: Path, median: int, changes: dict[str, dict[str, object]], tokens: int | None
) -> None:
    given = recipe(tmp_path, **{"benchmark": {"median_length": True}, **changes})
    found = short_requests(run_of(given, median))  # type: ignore[arg-type]
    assert (found.workload.seq_len if found else None) == tokens


def test_a_workload_of_one_length_can_be_read_again(tmp_path: Path) -> None:
    given = recipe(tmp_path, environment={"workload": {"lengths": {32: 1}}}, benchmark={"median_length": True})
    found = short_requests(run_of(given, 9))  # type: ignore[arg-type]
    assert found is not None
    assert Environment.model_validate(found.model_dump(mode="json")).workload.seq_len == 9


@pytest.mark.slow
def test_the_report_shows_them_beside_the_workloads(tmp_path: Path) -> None:
    save_dense(tmp_path / "model", task="text-classification", num_hidden_layers=1)
    for name, seed in (("train", 0), ("test", 1)):
        write_rows(tmp_path / f"{name}.jsonl", 80, seed)
    given = recipe(tmp_path, benchmark={"median_length": True})
    report = run_pipeline(given)
    record = BenchmarkRecord.load(given.run_dir / "benchmark-of-short-requests.json")
    median = report.lengths["evaluation"].median
    assert record.environment.workload.seq_len == report.short_tokens == median < 24
    dense, member = report.members
    assert dense.short_speedup is None
    assert member.short_speedup is not None
    assert member.short_speedup.value == record.variant("1.5x").speedup
    text = (given.run_dir / "report.md").read_text(encoding="utf-8")
    assert f"| model | speedup at 32 tokens | at {median} |" in text
    assert report.short_itself == record.itself
    assert f"At that length, {aa_line(record.itself, report.tolerance)}." in text
    card = (given.run_dir / "1.5x" / "README.md").read_text(encoding="utf-8")
    assert f"Of this measurement, {aa_line(report.itself, report.tolerance)}." in card
    longer = [{"text": " ".join(["the cat sat"] * 9), "label": number % 3} for number in range(80)]
    (tmp_path / "longer.jsonl").write_text("\n".join(map(json.dumps, longer)), encoding="utf-8")
    fields = given.model_dump(mode="json")
    fields["data"]["evaluation"] = str(tmp_path / "longer.jsonl")
    of_others = ziplm_deploy.report(parse_recipe(fields))  # measures nothing: what it says of texts is of these
    assert of_others.lengths["evaluation"].median > 24
    assert of_others.short_tokens is None
    assert not any("half of the evaluation texts" in note for note in of_others.notes)
