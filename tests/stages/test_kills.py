"""Runs that are killed go on to what an undisturbed run makes; the program in ``benchmarks`` kills many more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
