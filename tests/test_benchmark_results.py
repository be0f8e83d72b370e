"""Result files of the benchmark programs: one shape, goals, and the summary over them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from accuracy import beside_dense, percent_figure, percent_of_dense_text  # noqa: E402
from additivity import deviation_bounds  # noqa: E402
from common import Figure, goal_met, write_result  # noqa: E402
from compound import best  # noqa: E402
from equal_speed import Windows, log_perplexity_at, wins  # noqa: E402
from summary import measured_at  # noqa: E402
from traffic import gains_of, long_tailed, relative_latency_at, resampled_gains, workloads_of  # noqa: E402

from ziplm_deploy.tasks import get_task  # noqa: E402
from ziplm_deploy.tasks.outcomes import Outcomes, halves  # noqa: E402


@pytest.mark.parametrize(
    ("predicted", "nearest", "farthest"),
    [(2.0, 0.0, 5.2632), (2.1, 0.0, 10.5263), (2.2, 4.7619, 15.7895), (1.8, 5.2632, 14.2857)],
)
def test_a_deviation_is_known_as_well_as_the_speedup(predicted: float, nearest: float, farthest: float) -> None:
    row = {"predicted_speedup": predicted, "measured_low": 1.9, "measured_high": 2.1}
    assert deviation_bounds(row, "") == pytest.approx((nearest, farthest), rel=1e-4)


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (3.1, "<= 5", True),
        (5, "< 5", False),
        (1, ">= 1", True),
        (0.9, "> 1", False),
        (3, "3 to 4", True),
        (4.1, "3 to 4", False),
        (2.9, "3 to 4", False),
        (1, "", None),
        (1, "small", None),
    ],
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
    assert (
        "| additivity | `worst_deviation_percent` | 3.1 % | 2.4 to 3.9 | <= 5 | met, no interval | 24 |" in shown.stdout
    )


@pytest.mark.parametrize(
    ("settings", "figure", "shown"),
    [
        ({}, "stsb_percent", "of_merging"),
        ({"tasks": {"stsb": {"commit": "one"}, "stsb-regression": {"commit": "two"}}}, "stsb_percent", "one"),
        (
            {"tasks": {"stsb": {"commit": "one"}, "stsb-regression": {"commit": "two"}}},
            "stsb_regression_percent",
            "two",
        ),
        ({"sst2": {"commit": "one"}, "rte": {"commit": "two"}, "seed": 0}, "best_percent", "one, two"),
        ({"parts": [{"task": "rte", "commit": "one"}, {"task": "rte", "commit": "two"}]}, "rte_percent", "one, two"),
    ],
)
def test_a_figure_names_the_commits_it_was_measured_at(settings: dict[str, Any], figure: str, shown: str) -> None:
    result = {"commit": "of_merging", "machine": {"cpu": "EPYC", "isa": ["avx2", "fma"]}, "settings": settings}
    assert measured_at(result, figure) == ("EPYC (AVX2)", shown)


def test_a_figure_names_the_cpus_of_its_parts() -> None:
    parts = {
        name: {"commit": name, "machine": {"cpu": name, "isa": isa}}
        for name, isa in (("sst2", ["avx2", "avx512f", "avx512_vnni"]), ("rte", ["avx2", "avx512_vnni", "amx_int8"]))
    }
    result = {"commit": "of_merging", "machine": {"cpu": "last", "isa": []}, "settings": parts}
    assert measured_at(result, "best_percent") == ("sst2 (AVX-512 VNNI), rte (AMX)", "sst2, rte")
    assert measured_at(result, "rte_percent") == ("rte (AMX)", "rte")
    assert measured_at(result | {"settings": {}}, "rte_percent") == ("last", "of_merging")


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((93.5, 96.5), "met"), ((92.0, 98.0), "undecided"), ((90.0, 94.0), "undecided"), ((90.0, 92.9), "MISSED")],
)
def test_a_goal_of_two_limits_is_undecided_where_the_interval_holds_either(
    interval: tuple[float, float], expected: str
) -> None:
    assert Figure(sum(interval) / 2, "%", "93 to 97", 1, interval=interval).verdict == expected


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


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((98.2, 99.9), "undecided"), ((99.0, 99.9), "met"), ((97.0, 98.9), "MISSED"), (None, "met, no interval")],
)
def test_a_goal_is_decided_by_the_whole_interval(
    tmp_path: Path, interval: tuple[float, float] | None, expected: str
) -> None:
    figure = Figure(99.1, "%", ">= 99", 1, interval=interval)
    assert figure.verdict == expected
    write_result("family", {"kept": figure}, [], {}, tmp_path / "family.json")
    shown = summary(tmp_path)
    assert f"| {expected} |" in shown.stdout
    assert shown.returncode == int(expected == "MISSED")


def answers(right: list[int], n: int = 200) -> Outcomes:
    """Answers to ``n`` questions, of which those numbered are right."""
    predicted = np.ones(n, dtype=int)
    predicted[right] = 0
    return Outcomes({"label": np.zeros(n, dtype=int), "predicted": predicted})


def test_a_choice_by_luck_is_reported_on_the_other_half() -> None:
    """A file that lost all its wrong answers on the half that reports looks perfect on the half that chooses."""
    task, (chooses, reports) = get_task("text-classification"), halves(200, 0)
    dense, lucky = answers(list(range(200))), answers([*chooses, *reports[:70]])
    row = beside_dense(task, lucky, dense)
    assert row["percent_on_choosing_half"] == 100
    assert row["on_reporting_half"]["percent_of_dense"] == pytest.approx(70)
    assert row["percent_of_dense"] == pytest.approx(85)
    assert row["percent_low"] < 85 < row["percent_high"] < 92
    assert percent_of_dense_text(row).startswith("85.0 % [")
    assert percent_figure(row["on_reporting_half"], ">= 99").verdict == "MISSED"


def test_the_best_file_is_the_fastest_of_those_that_one_half_accepts() -> None:
    def row(speedup: float, chosen_by: float, reported: float) -> dict[str, Any]:
        half = {"percent_of_dense": reported, "percent_low": reported - 2, "percent_high": reported + 2}
        timing = {"speedup": speedup, "low": speedup - 0.1, "high": speedup + 0.1, "n": 40}
        scored = {"score": 0.9, "percent_on_choosing_half": chosen_by, "on_reporting_half": {**half, "n_examples": 100}}
        return {"task": "a", **timing, **scored}

    rows = [row(9.0, 99.1, 97.5), row(12.0, 98.9, 100.0), row(3.0, 99.9, 99.9), {"task": "a", "refused": True}]
    figures = best(rows, 99.0)
    speedup, keeps = (figures[f"best_speedup_at_99_percent{end}"] for end in ("", "_keeps"))
    assert (speedup.value, speedup.verdict, speedup.interval) == (9.0, "met", (8.9, 9.1))
    assert (keeps.value, keeps.verdict, keeps.n) == (97.5, "undecided", 100)


WIDE = ((1.5, 0.005), (3.0, 0.08))  # speedups, losses: whatever is resampled stays between


def searched(name: str, target: float, loss: float, speedup: float) -> dict[str, Any]:
    return {"searched_for": name, "target": target, "loss": loss, "measured_speedup": speedup}


def test_rivals_of_traffic_are_read_at_its_own_loss() -> None:
    mean = [searched("mean", 1.5, 0.01, 1.5), searched("mean", 3.0, 0.04, 3.0)]
    longest = [searched("longest", 2.0, 0.015, 1.4), searched("longest", 3.0, 0.018, 2.0)]
    assert relative_latency_at(0.02, mean) == pytest.approx(1 / np.sqrt(1.5 * 3.0))  # half way of both logarithms
    assert relative_latency_at(0.01, mean) == pytest.approx(1 / 1.5)
    assert relative_latency_at(0.005, mean) is None
    (gain,) = gains_of([searched("traffic", 2.0, 0.02, 2.25), *mean, *longest])
    assert gain == {
        "target": 2.0,
        "over_mean_percent": pytest.approx(100 * (2.25 / np.sqrt(4.5) - 1)),
        "over_longest_percent": None,
    }
    (both,) = gains_of([searched("traffic", 2.0, 0.018, 2.25), *mean, *longest])
    assert both["over_longest_percent"] == pytest.approx(12.5)
    assert both["over_the_better_percent"] == min(both["over_mean_percent"], both["over_longest_percent"])


def test_gains_of_traffic_are_as_uncertain_as_losses_and_speedups() -> None:
    rows = [
        {**each, "measured_low": each["measured_speedup"], "measured_high": each["measured_speedup"]}
        for each in (
            searched("traffic", 2.0, 0.02, 2.25),
            *(searched(name, target, loss, target) for name in ("mean", "longest") for target, loss in WIDE),
        )
    ]
    known = resampled_gains(rows, [np.full(50, each["loss"]) for each in rows], seed=0)
    expected = gains_of(rows)[0]["over_the_better_percent"]
    assert [gain[0]["over_the_better_percent"] for gain in known] == pytest.approx([expected] * len(known))
    noise = np.random.default_rng(0).lognormal(sigma=1.0, size=50)
    drawn = resampled_gains(rows, [each["loss"] * noise / noise.mean() for each in rows], seed=0)
    assert np.std([gain[0]["over_mean_percent"] for gain in drawn]) < 1e-9  # the same sentences are hard for all
    rows[0] |= {"measured_low": 2.0, "measured_high": 2.5}
    spread = np.std(
        [g[0]["over_mean_percent"] for g in resampled_gains(rows, [np.ones(9) * r["loss"] for r in rows], 0)]
    )
    assert 4 < spread < 8  # a speedup known to 11 % to a side


def test_lengths_of_traffic_have_a_long_tail() -> None:
    workloads = workloads_of(long_tailed())
    traffic, mean, longest = (workloads[name].calls for name in ("traffic", "mean", "longest"))
    assert len(traffic) == 8
    assert mean[0].seq_len == pytest.approx(24 * np.exp(0.9**2 / 2), rel=0.05)  # the mean of the distribution, uncut
    assert longest[0].seq_len == traffic[-1].seq_len == 256
    assert sum(call.weight for call in traffic if call.seq_len < mean[0].seq_len) > 0.6


def decoder_row(method: str, speedup: float, **perplexities: float) -> dict[str, Any]:
    measured = {"measured_speedup": speedup, "measured_low": speedup, "measured_high": speedup}
    return {
        "name": f"{method} {speedup:g}x",
        "method": method,
        "target": speedup,
        "seed": 0,
        **measured,
        **perplexities,
    }


def windows_of(rows: list[dict[str, Any]], dense: float, n: int = 40) -> Windows:
    """Windows of 10 tokens, some of them harder for every model."""
    tokens, hard = np.full(n, 10), np.random.default_rng(0).normal(size=n)
    windows = Windows(tokens, {"dense": -10 * (np.log(dense) + hard - hard.mean())})
    for row in rows:
        for key in (each for each in row if each.startswith("perplexity")):
            windows.log_likelihoods[f"{row['name']} {key}"] = -10 * (np.log(row[key]) + hard - hard.mean())
    return windows


def test_rivals_are_compared_at_the_speed_that_was_measured() -> None:
    rows = [
        decoder_row("ziplm", 1.5, perplexity=40.0, perplexity_recovered=33.0),
        decoder_row("ziplm", 2.0, perplexity=81.0),
        decoder_row("flap", 4.0, perplexity=160.0, perplexity_recovered=35.0),
        decoder_row("magnitude", 1.6, perplexity=30.0),
    ]
    dense = 40.0
    windows = windows_of(rows, dense)
    # half of the way from 1 to 4 in logarithms, so the geometric mean of 40 and 160
    assert log_perplexity_at(2.0, rows[2:3], dense, "perplexity") == pytest.approx(np.log(80))
    assert log_perplexity_at(4.1, rows[2:3], dense, "perplexity") is None
    assert log_perplexity_at(1.5, rows[3:], dense, "perplexity_recovered") is None  # of dense alone
    one_shot = wins(rows, windows, "ziplm", ["flap", "magnitude"], "perplexity")
    assert one_shot is not None
    assert (one_shot.value, one_shot.n) == (pytest.approx(1 / 3), 3)  # at 2x, flap has 80 and magnitude nothing
    assert one_shot.interval == pytest.approx((1 / 3, 1 / 3))  # the same windows are hard for all
    recovered = wins(rows, windows, "ziplm", ["flap", "magnitude"], "perplexity_recovered")
    assert recovered is not None
    assert (recovered.value, recovered.n) == (1.0, 1)
    assert wins(rows, windows, "uniform", ["flap"], "perplexity") is None


def test_a_win_is_undecided_where_the_speed_is() -> None:
    rows = [decoder_row("ziplm", 2.0, perplexity=79.0), decoder_row("flap", 4.0, perplexity=160.0)]
    rows[0] |= {"measured_low": 1.8, "measured_high": 2.2}  # at 1.8x the rival has 72
    found = wins(rows, windows_of(rows, 40.0), "ziplm", ["flap"], "perplexity")
    assert found is not None
    assert (found.value, found.interval, found.verdict) == (1.0, (0.0, 1.0), "undecided")


def test_a_perplexity_is_known_as_well_as_its_windows_are_alike() -> None:
    windows = windows_of([], 40.0, n=400)
    low, high = windows.interval(["dense"])
    assert windows.perplexity("dense") == pytest.approx(40.0)
    assert low < 40.0 < high
    assert np.log(high / low) == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.15)  # windows differ by a factor of e
