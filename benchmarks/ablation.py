"""What each part of recovery contributes: the same targets and the same number of training steps, one part changed.

``python benchmarks/ablation.py --data FOLDER --table TABLE`` trains all-MiniLM-L6-v2 on STS-B (label-free), and
``--task sst2 --model CHECKPOINT`` a fine-tuned classifier; each writes its rows to ``runs/ablation``, and ``--merge``
writes ``benchmarks/results/ablation.json``. Gradual runs go through 1.5x, 2x and 3x with ``--steps`` each; the one-shot
run takes all their steps for 3x alone. Speedups are those that the table predicts: latency does not depend on weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common import Figure, commit, write_result
from family import MODEL, one_task_parser, recipe_of, rows_of

from ziplm_deploy.api import run_recipe
from ziplm_deploy.artifacts import write_text
from ziplm_deploy.config import Recipe
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipes import parse_recipe

TARGETS = (1.5, 2.0, 3.0)
FULL = "gradual"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "no token distillation": {"token_weight": 0.0},
    "no logit distillation": {"logit_weight": 0.0},
    "Hessians not rebuilt": {"rebuild_hessians": False},
    "one-shot": {"mode": "one-shot"},
    "with dropout": {"dropout": True},
}


def variant_recipe(label: str, options: argparse.Namespace) -> Recipe:
    """The family's recipe with one part changed, and no latency measured."""
    raw = recipe_of(options.task, options).model_dump(mode="json")
    changes = VARIANTS[label]
    if changes.get("mode") == "one-shot":
        raw["speedups"] = [TARGETS[-1]]
        changes = {**changes, "max_steps": len(TARGETS) * options.steps}
    raw["name"] = f"ablation-{options.task}-{label.replace(' ', '-')}"
    raw["recover"] |= changes
    raw["benchmark"] |= {"rounds": 5, "runs_per_round": 1, "max_corrections": 0}
    return parse_recipe(raw, source=label)


def run_task(options: argparse.Namespace) -> None:
    """All variants of one task, each kept as soon as it is done."""
    path = options.work / f"{options.task}.json"
    part = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
    for label in options.variants:
        recipe = variant_recipe(label, options)
        report = run_recipe(recipe, ConsoleProgress())
        part["rows"] = [row for row in part["rows"] if row["variant"] != label]
        part["rows"] += [{"variant": label, **row} for row in rows_of(options.task, report)]
        part |= {"commit": commit(), "recover": recipe.recover.model_dump(mode="json"), "steps": options.steps}
        write_text(path, json.dumps(part, indent=1) + "\n")
        shutil.rmtree(recipe.run_dir)


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Points of the dense score, in percent, that the full method gains over each variant at the largest target."""
    figures = {}
    last = [row for row in rows if row["target"] == TARGETS[-1]]
    full = {row["task"]: row["percent_of_dense"] for row in last if row["variant"] == FULL}
    for row in last:
        if row["variant"] != FULL and row["task"] in full:
            name = f"{row['task']}_gain_over_{row['variant'].lower().replace(' ', '_').replace('-', '_')}"
            figures[name] = Figure(full[row["task"]] - row["percent_of_dense"], "points", "report", 1)
    return figures


def merge(work: Path) -> None:
    parts = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(work.glob("*.json"))}
    if not parts:
        sys.exit(f"expected results of single tasks in {work}, found none; run with --task first")
    rows = [row for part in parts.values() for row in part["rows"]]
    about = {name: {key: value for key, value in part.items() if key != "rows"} for name, part in parts.items()}
    write_result("ablation", figures_of(rows), rows, {"model": MODEL, "targets": TARGETS, "tasks": about})


def main() -> None:
    parser = one_task_parser(__doc__, "ablation", "optimizer steps between two targets")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    options.targets = list(TARGETS)
    if options.merge:
        merge(options.work)
    else:
        run_task(options)


if __name__ == "__main__":
    main()
