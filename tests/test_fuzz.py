"""A few of the cases of ``benchmarks/robustness.py --only fuzz``, and proof that it sees what it looks for."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import robustness_fuzz as fuzz  # noqa: E402
import robustness_readers as readers  # noqa: E402

from ziplm_deploy.errors import RecipeError  # noqa: E402

# torch and numpy have threads when pytest forks; the children use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    fuzz.prepare(folder)
    return folder


@pytest.mark.slow
def test_damaged_files_are_taken_or_refused(tmp_path: Path) -> None:
    options = ["--only", "fuzz", "--fuzz-cases", "130", "--seed", "1", "--output", str(tmp_path / "fuzz.json")]
    done = subprocess.run([sys.executable, str(BENCHMARKS / "robustness.py"), *options], capture_output=True, text=True)
    result = json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))
    assert [row for row in result["rows"] if "failed" in row] == [], done.stderr
    assert {row["reader"] for row in result["rows"]} == {reader.__name__ for reader in readers.READERS}
    assert sum(row["taken"] for row in result["rows"]) >= 5
    assert sum(row["refused"] for row in result["rows"]) >= 50
    assert result["figures"]["fuzz_failures"]["value"] == 0
    assert result["figures"]["fuzz_peak_memory_bytes"]["value"] < 2 << 30


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("raise RuntimeError('a traceback')", "RuntimeError"),
        ("raise SystemExit(1)", "SystemExit"),
        ("os._exit(3)", "the process died"),
        ("time.sleep(60)", "hung"),
        ("b'x' * (1 << 30)", "GiB of memory"),
        ("(folder / 'ran').touch()", "AssertionError"),
        ("raise RecipeError('x' * 10**6)", "a message of 1000000 characters"),
    ],
)
def test_every_kind_of_failure_is_seen(corpus: Path, monkeypatch: pytest.MonkeyPatch, fault: str, seen: str) -> None:
    def faulty(folder: Path, rng: Any) -> None:
        exec(fault, {"os": os, "time": time, "folder": folder, "RecipeError": RecipeError})

    # What pytest holds now, not the most that it has held: a child's peak starts from there.
    begins_with = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    monkeypatch.setattr(fuzz, "MAX_MEMORY_BYTES", begins_with + (600 << 20))
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 5.0 if seen == "hung" else 60.0)
    monkeypatch.setitem(readers.READERS, faulty, 1)
    wanted = [fuzz.Case("plan", 0), fuzz.Case("faulty", 0), fuzz.Case("plan", 1)]
    outcomes = {outcome.case: outcome.what for outcome in fuzz.run_cases(wanted, corpus, seed=1)}
    assert seen in outcomes[fuzz.Case("faulty", 0)]
    assert outcomes.keys() == set(wanted)
    assert outcomes[fuzz.Case("plan", 0)] in fuzz.PASSED


def test_a_case_gives_the_same_damage_again(corpus: Path) -> None:
    first, second = (fuzz.run_cases(fuzz.cases(20), corpus, seed=5) for _ in range(2))
    assert sorted(outcome[:3] for outcome in first) == sorted(outcome[:3] for outcome in second)
