"""What commands print: rich tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ziplm_deploy.latency.record import BenchmarkRecord, FileTiming
from ziplm_deploy.reporting import table as members
from ziplm_deploy.reporting.records import FamilyReport, Timed
from ziplm_deploy.reporting.retrieval import retrieval_cells, retrieval_title
from ziplm_deploy.reporting.table import aa_line, page_lines, percent_text, ratio_text
from ziplm_deploy.reporting.tower_pairs import TITLES, TowerPairs, pair_rows
from ziplm_deploy.tasks.retrieval_scores import RetrievalScores

if TYPE_CHECKING:
    from ziplm_deploy.models.model_types import ModelType

WIDE = 200  # columns of a stream that is no terminal: tables are not folded in files and pipes


def print_json(value: Any) -> None:
    """``value`` as JSON on stdout, one document."""
    print(json.dumps(value, indent=1))


def print_family(report: FamilyReport, folder: Path) -> None:
    """The table that a run ends with, and where everything is."""
    console = _console()
    console.print()
    console.print(
        _table(
            f"{report.name}: {report.environment.describe()}",
            members.header(report.members, report.metric),
            [
                *members.rows(report.members, report.metric),
                *members.baseline_rows(report.members, report.baselines, report.metric),
            ],
        )
    )
    if report.environment.workload.has_several:
        _print_calls(console, {member.name: member.served for member in report.members}, report.members[0].name)
    if report.retrieval is not None:
        _print_retrieval(console, report.retrieval)
    if members.has_other_baseline(report):
        line(console, f"baseline: the dense model on {members.baseline_of(report)}; members run on {report.engine}")
    line(console, aa_line(report.itself, report.tolerance))
    for text in page_lines(report):
        line(console, text)
    for member in report.members:
        if member.reason:
            line(console, f"{member.name}: {member.reason}")
    for text in members.baseline_lines(report):
        line(console, text)
    for note in report.notes:
        line(console, f"note: {note}")
    line(console, f"models: {', '.join(str(folder / member.folder) for member in report.members)}")
    line(console, f"report: {folder / 'report.md'} (and report.json)")


def _print_retrieval(console: Console, found: RetrievalScores) -> None:
    """What every file finds."""
    titles, rows = retrieval_cells(found, list(found.files))
    console.print(_table(f"retrieval: {retrieval_title(found)}", titles, rows))


def print_benchmark(record: BenchmarkRecord) -> None:
    """Latency and speedup of every file on its engine."""
    cells = [
        [
            timing.name,
            f"{timing.engine} {timing.engine_version}",
            "1x"
            if timing.name == record.baseline
            else ratio_text(timing.speedup, timing.speedup_low, timing.speedup_high),
            f"{timing.p50_ms:.3f}",
            f"{timing.latency.p90_ms:.3f}",
            f"{timing.latency.p99_ms:.3f}",
            f"{timing.throughput_per_second:.1f}",
            f"{timing.peak_memory_bytes / 2**20:.0f}",
        ]
        for timing in record.variants
    ]
    console = _console()
    titles = ["model", "engine", "speedup [95 %]", "p50 ms", "p90 ms", "p99 ms", "per second", "peak MiB"]
    environment = record.environment
    title = f"{environment.workload.describe()}, {environment.threads} thread(s)"
    console.print(_table(title, titles, cells))
    if environment.workload.has_several:
        _print_calls(console, {timing.name: timing for timing in record.variants}, record.baseline)
    line(console, aa_line(record.itself, record.tolerance))


def print_tower_pairs(found: TowerPairs) -> None:
    """Every pair of files of two towers, the fastest first, and which one to take."""
    console = _console()
    calls = f"{found.text_calls:g} call(s) of the text tower, {found.image_calls:g} of the image tower"
    console.print(_table(f"{calls}, budget {found.budget_ms:g} ms", TITLES, pair_rows(found)))
    line(console, f"scores: {found.metric} on {found.n_images:,} images and their captions, 95 % intervals")
    if (unseen := found.unseen) is not None:
        low, high = unseen.interval
        line(
            console,
            f"chosen by one half of the images; on the other {unseen.n_images:,}: {unseen.score:.4f} "
            f"[{low:.4f}, {high:.4f}], of dense {percent_text(unseen.of_dense)}",
        )


def _print_calls(console: Console, files: Mapping[str, Timed | FileTiming], baseline: str) -> None:
    """Every call that the files were timed on, the baseline's figures first."""
    names = [baseline, *(name for name in files if name != baseline)]
    rows = members.call_rows([files[name] for name in names])
    console.print(_table("each call: median, and speedup [95 %]", members.call_header(names), rows))


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """One line a layer."""
    titles = [key for key in rows[0] if key not in ("prunable", "reason")]
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in titles] for row in rows]
    _console().print(_table(title, titles, cells))


def print_type(kind: ModelType) -> None:
    """What can be pruned in a model of this type, and what stays."""
    _console().print(
        f"pruned: {'; '.join(kind.pruned)}\nstays: {', '.join(kind.dense)}\nproved with: {kind.proof}", style="dim"
    )


def print_types(kinds: list[ModelType]) -> None:
    """One line a type."""
    cells = [
        [kind.model_type, kind.proof or "no", "; ".join(kind.pruned) or kind.reason.partition(": ")[2]]
        for kind in kinds
    ]
    _console().print(_table("model types", ["type", "proved with", "what can be pruned, or why not"], cells))


def print_findings(findings: dict[str, Any]) -> None:
    """What ``doctor`` found."""
    console, machine, noise = _console(), findings["machine"], findings["noise"]
    line(console, f"CPU: {machine['cpu_model']}")
    line(console, f"instruction sets: {' '.join(machine['isa_flags']) or 'none that matter here'}")
    line(
        console,
        f"cores: {machine['logical_cores']} in the machine, {machine['usable_cores']} granted by affinity and cgroup",
    )
    line(console, f"memory: {machine['memory_bytes'] / 2**30:.1f} GiB; system: {machine['operating_system']}")
    for kind in ("engine", "tool"):
        for each in findings[f"{kind}s"]:
            found = f"version {each['version']}" if each["version"] else f"missing: {each['missing']}"
            found += f" ({each['notice']})" if each["notice"] else ""
            line(console, f"{kind} {each['name']}: {found}")
    for each in findings["baselines"]:
        found = f"made by {each['tool']}, {each['settings']}" if each["tool"] else f"missing: {each['missing']}"
        line(console, f"baseline {each['name']} ({each['title']}): {found}")
    line(console, "versions: " + ", ".join(f"{name} {version}" for name, version in findings["versions"].items()))
    if "error" in noise:
        line(console, f"noise: could not be measured: {noise['error']}")
        return
    line(
        console,
        f"noise: one model against itself {ratio_text(noise['aa_ratio'], noise['aa_low'], noise['aa_high'])}, "
        f"floor {100 * noise['floor']:.1f} %: {noise['verdict']}",
    )


def line(console: Console, text: str) -> None:
    """Plain text: no markup, no colours, no folding of paths."""
    console.print(Text(text), soft_wrap=True)


def _table(title: str, titles: list[str], cells: list[list[str]]) -> Table:
    grid = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(titles):
        grid.add_column(Text(name), justify="left" if index in (0, len(titles) - 1) else "right")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE, highlight=False)
