"""Whole runs that serve from huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.models import save_dense
from tests.helpers.pipeline import recipe, write_rows
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.machine.huge_pages import why_no_huge_pages
from ziplm_deploy.pipeline import run_pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_huge_pages()), reason=f"no huge pages here: {why_no_huge_pages()}"),
]


def test_the_dense_model_is_timed_with_plain_pages_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048}  # 12 MB of FFN a layer: more than one huge page
    save_dense(tmp_path / "model", task="text-classification", **sizes)
    for name, seed in (("train", 0), ("test", 1)):
        write_rows(tmp_path / f"{name}.jsonl", 80, seed)
    report = run_pipeline(recipe(tmp_path, environment={"huge_pages": True}, benchmark={"parity_atol": 1e-3}))
    plain, dense = report.plain_pages, report.members[0].served
    assert plain is not None
    assert dense.huge_page_bytes is not None
    assert plain.huge_page_bytes is not None
    assert dense.huge_page_bytes > 2**22 >= plain.huge_page_bytes
    names = [timing.name for timing in BenchmarkRecord.load(tmp_path / "runs" / "tiny" / "benchmark.json").variants]
    assert names == ["dense", "1.5x", "dense (plain pages)"]
    assert [member.name for member in report.members] == ["dense", "1.5x"], "no member of the family"
    assert "huge pages held" in (tmp_path / "runs" / "tiny" / "report.md").read_text(encoding="utf-8")
