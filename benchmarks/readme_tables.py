"""Regenerate the tables between markers in README.md: ``python benchmarks/readme_tables.py``.

``<!-- table:NAME -->`` … ``<!-- end:NAME -->``: ``recipe`` comes from the recipe's own field descriptions, the others
from ``benchmarks/results``. With ``--check`` nothing is written; exit code 1 says it is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, goal_met
from summary import read_results
from summary import table as figures_table

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.recipe import recipe_reference
from ziplm_deploy.reporting.records import MemberReport
from ziplm_deploy.reporting.table import header, markdown_table, rows

README = ROOT / "README.md"
PENDING = "No result is committed yet."


def committed(name: str) -> dict[str, Any] | None:
    """The result of a program; None before there is one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def quickstart_table() -> str:
    """Members of the committed quickstart run, and where it was measured."""
    result = committed("quickstart")
    if result is None:
        return PENDING
    members = [MemberReport.model_validate(row) for row in result["rows"]]
    settings, metric = result["settings"], result["settings"]["metric"]
    ratio, low, high = settings["aa"]
    caption = (
        f"{settings['environment']}, {result['machine']['cpu']}, onnxruntime {result['versions']['onnxruntime']}, "
        f"{result['date'][:10]}; the dense model against itself in the same run: {ratio:.3f} [{low:.3f}, {high:.3f}]. "
        f"The run took {result['figures']['total_seconds']['value'] / 60:.1f} minutes."
    )
    return "\n".join([*markdown_table(header(members, metric), rows(members, metric)), "", caption])


def family_table() -> str:
    """Members of the committed families: what training brought back, and what it took."""
    result = committed("family")
    if result is None:
        return PENDING
    titles = [
        "task",
        "measured [95 %]",
        "metric",
        "dense",
        "before training",
        "trained",
        "of dense",
        "steps",
        "seconds",
    ]
    cells = [
        [
            row["task"],
            f"{row['measured_speedup']:.2f}x [{row['measured_low']:.2f}, {row['measured_high']:.2f}]",
            row["metric"],
            f"{row['dense_score']:.4f}",
            f"{row['score_before_training']:.4f}",
            f"{row['score']:.4f}",
            _percent(row["percent_of_dense"]),
            str(row["training"]["steps"]),
            f"{row['training']['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    places: dict[str, list[str]] = {}
    for task, about in result["settings"]["tasks"].items():
        origin = result | about
        place = f"{origin['machine']['cores']} core(s) of {origin['machine']['cpu']}, {origin['date'][:10]}"
        places.setdefault(place, []).append(task)
    caption = (
        "One gradual run a task, one seed: " + "; ".join(f"{', '.join(t)} on {p}" for p, t in places.items()) + "."
    )
    return "\n".join([*markdown_table(titles, cells), "", caption])


def ablation_table() -> str:
    """What is left of the dense score with each part of recovery changed, target by target."""
    result = committed("ablation")
    if result is None:
        return PENDING
    targets = sorted({row["target"] for row in result["rows"]})
    found = {(row["task"], row["variant"], row["target"]): row["percent_of_dense"] for row in result["rows"]}
    cells = [
        [task, variant, *(_percent(found.get((task, variant, target))) for target in targets)]
        for task, variant in dict.fromkeys(key[:2] for key in found)
    ]
    return "\n".join(markdown_table(["task", "training", *(f"{target:g}x" for target in targets)], cells))


def pareto_table() -> str:
    """Scores of every method at its measured speedup, after the same training."""
    result = committed("pareto")
    if result is None:
        return PENDING
    cells = [
        [
            row["task"],
            row["method"],
            f"{row['measured_speedup']:.2f}x [{row['measured_low']:.2f}, {row['measured_high']:.2f}]",
            f"{row['score']:.4f}",
            _percent(row["percent_of_dense"]),
        ]
        for row in sorted(result["rows"], key=lambda row: (row["task"], row["target"]))
    ]
    return "\n".join(markdown_table(["task", "method", "measured [95 %]", "score", "of dense"], cells))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def compound_table() -> str:
    """Every form of every committed compound model on every engine: speedup and, where there are weights, accuracy."""
    result = committed("compound")
    if result is None:
        return PENDING
    engines = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    found = {(row["task"], row["member"], row["variant"], row["engine"]): row for row in result["rows"]}
    cells = []
    for task, member, variant in dict.fromkeys(key[:3] for key in found):
        own = [found[task, member, variant, engine] for engine in engines]
        cells.append([task, member, variant, *map(_speedup_and_score, own)])
    caption = (
        f"Speedup over dense float32 ONNX Runtime in the same run, and accuracy on that engine. Batch 1 where no other "
        f"is named, 128 tokens, 1 thread, {result['machine']['cpu']} "
        f"({' '.join(flag for flag in result['machine']['isa'] if 'vnni' in flag or 'int8' in flag)}), "
        f"{result['date'][:10]}; one seed. The dense model against itself in the same run: "
        + ", ".join("{:.3f} [{:.3f}, {:.3f}]".format(*part["timing"]["aa"]) for part in result["settings"].values())
        + "."
    )
    return "\n".join([*markdown_table(["task", "pruned to", "form", *engines], cells), "", caption])


def _speedup_and_score(row: dict[str, Any]) -> str:
    if row.get("refused"):
        return "not run by it"
    speedup = f"{row['speedup']:.2f}x"
    return f"{speedup}, {row['score']:.4f}" if "score" in row else speedup


def int8_table() -> str:
    """Every way to INT8 of every committed model: what it costs and what it brings."""
    result = committed("int8")
    if result is None:
        return PENDING
    cells = [
        [
            row["model"],
            row["form"],
            row["engine"],
            f"{row['score']:.4f}",
            f"{row['lost_points']:+.2f}",
            f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]",
            f"{row['onnx_bytes'] / 1e6:.1f}",
        ]
        for row in result["rows"]
    ]
    titles = ["model", "form", "engine", "accuracy", "points lost", "over float32 [95 %]", "ONNX MB"]
    return "\n".join(markdown_table(titles, cells))


def compound_targets_table() -> str:
    """The same compound targets, searched with a table in the deployed form and with a float32 table."""
    result = committed("compound_tables")
    if result is None:
        return PENDING
    cells = [
        [
            f"{row['target']:g}x",
            row["table"],
            f"{row['measured_speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]",
            f"{row['error_percent']:+.1f} %",
            str(row["corrections"]),
            f"{row['score']:.4f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["target"])
    ]
    titles = ["target", "table", "measured [95 %]", "off by", "corrections", "accuracy"]
    return "\n".join(markdown_table(titles, cells))


def figures_with_goals() -> str:
    """Every figure of every committed result that has a goal, against it."""
    results = read_results(RESULTS)
    for result in results:
        result["figures"] = {k: v for k, v in result["figures"].items() if goal_met(v["value"], v["goal"]) is not None}
    return figures_table(results) if results else PENDING


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart_table,
    "family": family_table,
    "ablation": ablation_table,
    "pareto": pareto_table,
    "compound": compound_table,
    "compound_tables": compound_targets_table,
    "int8": int8_table,
    "figures": figures_with_goals,
    "recipe": recipe_reference,
}


def fill(text: str) -> str:
    """``text`` with every marked table made anew.

    Raises:
        ValueError: a marker has no end, or names no table.
    """
    for name in re.findall(r"<!-- table:(\S+) -->", text):
        if name not in TABLES or f"<!-- end:{name} -->" not in text:
            raise ValueError(f"expected a known table with an end marker, found {name!r}; known: {', '.join(TABLES)}")
        begin, end = f"<!-- table:{name} -->", f"<!-- end:{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README is stale")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    filled = fill(text)
    if options.check:
        print("README is current" if filled == text else "README is stale: run python benchmarks/readme_tables.py")
        return int(filled != text)
    write_text(options.readme, filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
