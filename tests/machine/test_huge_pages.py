"""Huge pages: what is asked of the system, what is refused, and that a worker gets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EnvironmentMismatchError
from ziplm_deploy.machine import huge_pages
from ziplm_deploy.machine.huge_pages import ASSIGNMENT, check_huge_pages, why_no_huge_pages, with_huge_pages
from ziplm_deploy.recipe import Environment, workload


def setting(folder: Path, text: str) -> Path:
    path = folder / "enabled"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "libc", "reason"),
    [
        ("always [madvise] never\n", "glibc 2.36", ""),
        ("[always] madvise never\n", "glibc 2.35", ""),
        ("always madvise [never]\n", "glibc 2.36", "says never"),
        ("always [madvise] never\n", "glibc 2.31", "glibc 2.31"),
        ("always [madvise] never\n", None, "unknown"),
    ],
)
def test_what_the_system_must_offer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, libc: str | None, reason: str
) -> None:
    monkeypatch.setattr(huge_pages.os, "confstr", lambda name: libc)
    path = setting(tmp_path, text)
    assert reason in why_no_huge_pages(path)
    assert bool(why_no_huge_pages(path)) == bool(reason)
    if reason:
        with pytest.raises(EnvironmentMismatchError, match=r"environment\.huge_pages.*found"):
            check_huge_pages(path)


def test_a_kernel_without_them_is_named(tmp_path: Path) -> None:
    assert "transparent huge pages" in why_no_huge_pages(tmp_path / "absent")


def test_other_tunables_are_kept() -> None:
    variable, value = ASSIGNMENT.split("=", 1)
    assert with_huge_pages({"A": "b"}) == {"A": "b", variable: value}
    assert with_huge_pages({variable: "glibc.malloc.check=3:glibc.malloc.hugetlb=2"}) == {
        variable: f"glibc.malloc.check=3:{value}"
    }


@pytest.mark.parametrize("granted", [True, False])
def test_auto_means_where_they_are_granted(monkeypatch: pytest.MonkeyPatch, granted: bool) -> None:
    monkeypatch.setattr(workload, "why_no_huge_pages", lambda: "" if granted else "no kernel")
    environment = Environment(huge_pages="auto")  # type: ignore[arg-type]
    assert environment.huge_pages is granted
    assert ("huge pages" in environment.describe()) is granted
    assert Environment().huge_pages is False
    assert Environment().fingerprint == {name: v for name, v in environment.fingerprint.items() if name != "huge_pages"}


@pytest.mark.skipif(bool(why_no_huge_pages()), reason=f"no huge pages here: {why_no_huge_pages()}")
def test_a_worker_lies_on_huge_pages_when_asked(tmp_path: Path) -> None:
    path = write_mlp(tmp_path / "model.onnx", 4096)
    held = {}
    for asked in (False, True):
        with get_engine("onnxruntime").start_worker(WorkerOptions(seq_len=16, huge_pages=asked)) as worker:
            worker.load("model", path)
            worker.time("model", n=2)
            pages = Path(f"/proc/{worker._process.pid}/smaps_rollup").read_text(encoding="utf-8")
            told = worker.huge_page_bytes()
        held[asked] = next(int(line.split()[1]) for line in pages.splitlines() if line.startswith("AnonHugePages"))
        assert told == pytest.approx(1024 * held[asked], abs=2**24)  # the kernel may join more in between
    assert held[True] > held[False]
