"""One table of all figures in ``benchmarks/results`` against their goals.

``python benchmarks/summary.py`` prints Markdown; it exits with 1 if a goal is missed or a file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, cpu_text, verdict_of


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result file of a folder, by name.

    Raises:
        ValueError: a file is not JSON or lacks ``name``, ``figures`` or ``commit``; names it.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            missing = [key for key in ("name", "figures", "commit", "date", "machine") if key not in result]
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a benchmark result in {path}, found: {error}; run its program again") from error
        if missing:
            raise ValueError(f"expected {', '.join(missing)} in {path}, found none; run its program again")
        results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table: program, figure, value, spread or 95 % interval, goal, verdict, n, CPU, commit."""
    lines = [
        "| program | figure | value | spread | goal | | n | CPU | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, figure in result["figures"].items():
            bounds = figure.get("interval") or figure.get("spread") or []
            spread = " to ".join(f"{bound:.4g}" for bound in bounds)
            met = verdict_of(figure)
            value = f"{figure['value']:.4g} {figure['unit']}".strip()
            row = [
                result["name"],
                f"`{name}`",
                value,
                spread,
                figure["goal"],
                met,
                figure["n"],
                *measured_at(result, name),
            ]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def measured_at(result: Mapping[str, Any], figure: str) -> tuple[str, str]:
    """CPUs and commits that a figure was measured at: where a result is merged of parts, not those of the merging."""
    settings = result.get("settings", {})
    tasks, parts = settings.get("tasks", settings), settings.get("parts", [])
    named = [(name, part) for name, part in tasks.items() if isinstance(part, dict)]
    named += [(part["task"], part) for part in parts if isinstance(part, dict) and "task" in part]
    origins = [(name.replace("-", "_"), part) for name, part in named if "commit" in part]
    own = max((name for name, _ in origins if figure.startswith(f"{name}_")), key=len, default="")
    runs = [run for run in settings.get("runs", []) if isinstance(run, dict) and "commit" in run]  # of single seeds
    found = [{**result, **part} for name, part in origins if name == (own or name)]
    found = found or [{**result, **run} for run in runs] or [result]
    cpus, commits = [cpu_text(each["machine"]) for each in found], [each["commit"][:10] for each in found]
    return ", ".join(dict.fromkeys(cpus)), ", ".join(dict.fromkeys(commits))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with result files")
    options = parser.parse_args()
    try:
        results = read_results(options.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(results))
    figures = [figure for result in results for figure in result["figures"].values()]
    return 1 if any(verdict_of(figure).startswith("MISSED") for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
