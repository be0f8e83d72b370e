"""The quickstart's own run, timed from nothing to the report, and its members as README shows them.

``python benchmarks/quickstart.py`` runs ``benchmarks/quickstart.yaml`` in a fresh folder, with ``--recipe`` another,
such as ``benchmarks/quickstart_decoder.yaml``; the result is called after the recipe.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from additivity import deviation_bounds
from common import ROOT, Figure, load_average, write_result

from ziplm_deploy.api import run_recipe
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import load_recipe
from ziplm_deploy.reporting.records import FamilyReport, MemberReport

# Of a run: its wall time, and what the worst member keeps of the dense model's score.
GOALS = {"quickstart": ("<= 600", ">= 0.97"), "quickstart_decoder": ("<= 1500", "")}


def figures(report: FamilyReport, seconds: float, goals: tuple[str, str]) -> dict[str, Figure]:
    """Wall time, how close members come to their targets, and how far predictions are off."""
    members = report.members[1:]
    worst = min((_over_target(member) for member in members), key=lambda ratio: ratio.value)
    off = [100 * abs((m.predicted_speedup or 1.0) / m.served.measured_speedup - 1.0) for m in members]
    nearest, farthest = zip(*(deviation_bounds(prediction_row(member), "") for member in members), strict=True)
    found = {
        "total_seconds": Figure(seconds, "s", goals[0], 1),
        "stage_seconds_over_total": Figure(sum(report.stage_seconds.values()) / seconds, "", ">= 0.97", 1),
        "worst_measured_over_target": Figure(
            worst.value, "", ">= 0.98", len(members), interval=(worst.low, worst.high)
        ),
        "worst_prediction_percent": Figure(
            max(off), "%", "<= 5", len(members), (min(off), max(off)), (max(nearest), max(farthest))
        ),
    }
    kept = [member.served.of_dense[report.metric] for member in members if report.metric in member.served.of_dense]
    if kept:
        percent, low, high, n = min(
            (each.percent, each.percent_low, each.percent_high, each.n_examples) for each in kept
        )
        found["worst_score_over_dense"] = Figure(percent / 100, "", goals[1], n, interval=(low / 100, high / 100))
    return found


def prediction_row(member: MemberReport) -> dict[str, float]:
    """What was promised and the interval that was measured, as rows of ``additivity`` have them."""
    served = member.served
    return {
        "predicted_speedup": member.predicted_speedup or 1.0,
        "measured_low": served.measured_low,
        "measured_high": served.measured_high,
    }


def _over_target(member: MemberReport) -> Ratio:
    target, file = member.speedup_target or 1.0, member.served
    return Ratio(file.measured_speedup / target, file.measured_low / target, file.measured_high / target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "benchmarks" / "quickstart.yaml")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/ and the recipe's name")
    options = parser.parse_args()
    name = options.recipe.stem
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(options.recipe, {"output_dir": folder})
        began = time.monotonic()
        report = run_recipe(recipe, ConsoleProgress())
        seconds = time.monotonic() - began
    settings = {
        "model": report.model,
        "task": report.task,
        "metric": report.metric,
        "method": report.method,
        "environment": report.environment.describe(),
        "baselines": [baseline.model_dump(mode="json") for baseline in report.baselines],
        "aa": [report.aa_ratio, report.aa_low, report.aa_high],
        "processes": recipe.benchmark.processes,
        "stage_seconds": report.stage_seconds,
        "load_average_before": load,
    }
    rows = [member.model_dump(mode="json") for member in report.members]
    write_result(name, figures(report, seconds, GOALS[name]), rows, settings, options.output)


if __name__ == "__main__":
    main()
