"""Result files of the benchmark programs: one shape, goals, and the summary over them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from common import Figure, goal_met, write_result  # noqa: E402


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(3.1, "<= 5", True), (5, "< 5", False), (1, ">= 1", True), (0.9, "> 1", False), (1, "", None), (1, "small", None)],
)
def test_goals(value: float, goal: str, met: bool | None) -> None:
    assert goal_met(value, goal) is met


def summary(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "summary.py"), "--results", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_result_has_the_published_shape_and_the_summary_shows_it(tmp_path: Path) -> None:
    figures = {"worst_deviation_percent": Figure(3.1, "%", "<= 5", n=24, spread=(2.4, 3.9))}
    path = write_result("additivity", figures, [{"a": 1}], {"seed": 0}, tmp_path / "additivity.json")
    result = json.loads(path.read_text())
    assert list(result) == [
        *("name", "command", "date", "commit", "machine", "versions", "settings", "figures", "rows"),
    ]
    assert result["figures"]["worst_deviation_percent"] == {
        **{"value": 3.1, "unit": "%", "goal": "<= 5", "n": 24},
        "spread": [2.4, 3.9],
    }
    assert set(result["machine"]) == {"cpu", "isa", "cores", "memory_bytes"}
    assert set(result["versions"]) == {"python", "torch", "onnxruntime", "transformers", "onnx", "numpy"}
    shown = summary(tmp_path)
    assert shown.returncode == 0
    assert "| additivity | `worst_deviation_percent` | 3.1 % | 2.4 to 3.9 | <= 5 | met | 24 |" in shown.stdout


def test_summary_fails_on_a_missed_goal_and_on_a_damaged_file(tmp_path: Path) -> None:
    write_result("cost", {"seconds": Figure(400.0, "s", "<= 300", n=1)}, [], {}, tmp_path / "cost.json")
    missed = summary(tmp_path)
    assert missed.returncode == 1
    assert "MISSED" in missed.stdout
    (tmp_path / "cost.json").write_text('{"name": "cost"')
    damaged = summary(tmp_path)
    assert damaged.returncode == 1
    assert "cost.json" in damaged.stderr
    (tmp_path / "cost.json").write_text("{}")
    assert "expected name, figures" in summary(tmp_path).stderr
