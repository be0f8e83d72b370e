"""Scores beside the dense model's, with their uncertainty, as the rows of results carry them."""

from __future__ import annotations

from typing import Any

from common import Figure

from ziplm_deploy.reporting.records import FileReport
from ziplm_deploy.reporting.table import MISSING
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.outcomes import Outcomes, halves
from ziplm_deploy.tasks.resampling import Comparison, ResampledScores

SEED = 0  # of resamples, and of which half of the examples chooses


def beside_dense(task: Task, own: Outcomes, dense: Outcomes) -> dict[str, Any]:
    """Interval of the primary score, and the score in percent of dense: on all examples, and on each half of them.

    What is chosen among many files by its percent on the one half is reported by that on the other.
    """
    chooses, reports = halves(len(own), SEED)
    low, high = ResampledScores(task, own, SEED).interval(task.metric_name)
    return {
        "score_low": low,
        "score_high": high,
        **percent_row(compared(task, own, dense)),
        "percent_on_choosing_half": compared(task, own.take(chooses), dense.take(chooses)).percent,
        "on_reporting_half": percent_row(compared(task, own.take(reports), dense.take(reports))),
    }


def compared(task: Task, own: Outcomes, dense: Outcomes) -> Comparison:
    """The primary score of one model beside another's, on the same examples."""
    return ResampledScores(task, own, SEED).beside(ResampledScores(task, dense, SEED), task.metric_name)


def percent_row(comparison: Comparison | None) -> dict[str, Any]:
    """Percent of dense with its interval, and the difference; empty where nothing was compared."""
    if comparison is None:
        return {}
    return {
        "percent_of_dense": comparison.percent,
        "percent_low": comparison.percent_low,
        "percent_high": comparison.percent_high,
        "difference": comparison.difference,
        "difference_low": comparison.low,
        "difference_high": comparison.high,
        "n_examples": comparison.n_examples,
    }


def file_row(file: FileReport, metric: str) -> dict[str, Any]:
    """What a report knows of how sure a file's score is."""
    low, high = file.accuracy_intervals.get(metric, (None, None))
    return {"score_low": low, "score_high": high, **percent_row(file.of_dense.get(metric))}


def percent_figure(row: dict[str, Any], goal: str, n: int = 1) -> Figure:
    """Percent of dense of a row as a figure: its goal is met or missed if the whole interval says so."""
    low, high = row.get("percent_low"), row.get("percent_high")
    return Figure(row["percent_of_dense"], "%", goal, n, interval=None if low is None or high is None else (low, high))


def percent_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f} %"


def percent_of_dense_text(row: dict[str, Any]) -> str:
    """Percent of dense with its interval; results from before intervals were computed have none."""
    percent = percent_text(row["percent_of_dense"])
    if row.get("percent_low") is None:
        return percent
    return f"{percent} [{row['percent_low']:.1f}, {row['percent_high']:.1f}]"


def points_lost_text(row: dict[str, Any]) -> str:
    """Points lost with their interval, where one was computed."""
    lost = f"{row['lost_points']:+.2f}"
    if "difference_low" not in row:
        return lost
    return f"{lost} [{-100 * row['difference_high']:+.2f}, {-100 * row['difference_low']:+.2f}]"


def gain_text(rival: dict[str, Any]) -> str:
    """By how much this method scores higher than a rival on the same examples, where that was compared."""
    gain = rival.get("ours_less_this")
    if gain is None:
        return ""
    return f", {gain['difference']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}] less on the same examples"
