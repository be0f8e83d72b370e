"""Reports of runs that serve from huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.reports import benchmark_record, family_report, finished_run, member, variant
from ziplm_deploy.cli.console import print_family
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import Timed
from ziplm_deploy.stages import report as report_stage


def test_huge_pages_stand_beside_plain_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = Timed(**Timed.figures(variant("dense (plain pages)", 0.9).model_copy(update={"engine": "onnxruntime"})))
    environment = {"huge_pages": True, "workload": {"seq_len": 128}}
    report = family_report(member("dense"), member("2x"), environment=environment, plain_pages=plain)
    report.members[0].served.huge_page_bytes = 512 * 2**20
    print_family(report, tmp_path)
    shown = "".join(capsys.readouterr())
    for text in (family_markdown(report), shown):
        assert "huge pages held 512 MB of the dense model's process in onnxruntime; without them (unknown MB)" in text
        assert "0.900x [0.890, 0.910] of its speed; serve with GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in text
    card = model_card(report, report.members[1], None)
    assert "in the server's environment; without, dense in onnxruntime has 0.900x [0.890, 0.910] of its" in card
    assert "```\nGLIBC_TUNABLES=glibc.malloc.hugetlb=1 python serve.py\n```" in card
    assert "serve.py" not in model_card(family_report(member("dense"), member("2x")), report.members[1], None)
    assert "huge pages" not in family_markdown(family_report(member("dense"), member("2x")))


@pytest.mark.parametrize(("held", "is_noted"), [(0, True), (2**21, False), (None, False)])
def test_huge_pages_that_the_system_did_not_grant_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int | None, is_noted: bool
) -> None:
    monkeypatch.setattr(report_stage, "member_key", lambda run, member: "key")
    record = benchmark_record(**{"2x": 2.01, "4x": 3.5})
    record.environment = record.environment.model_copy(update={"huge_pages": True})
    record.variants[1].huge_page_bytes = held
    run = finished_run(tmp_path, record, {"dense": 0.88, "2x": 0.87, "4x": 0.8})
    assert any("but processes of 2x had none" in note for note in run.report().notes) is is_noted
