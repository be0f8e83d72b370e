"""Accuracy over speedup at equal training steps: this method against baselines recovered the same way.

``python benchmarks/pareto.py --task stsb --data FOLDER --table TABLE`` prunes all-MiniLM-L6-v2 by every method to the
same measured speedups and trains all of them alike; beside them stand the dense model and a fresh 3-layer student made
of every other layer and trained as long. What drops whole layers cannot reach any speedup: there this method gets what
three and two layers reach as its targets. Runs that are in the work folder already are not repeated. ``--merge`` writes
``benchmarks/results/pareto.json`` and a plot from all tasks' rows. ``wins_fraction``: share of (task, target, rival)
cells in which this method's score is higher, of a model that is not surely slower; its interval reaches from the share
in which it surely is, by pairs of answers on the same examples, to that in which it is not surely lower, however fast.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from accuracy import beside_dense, compared
from common import RESULTS, Figure, commit, write_result
from family import MODEL, one_task_parser, recipe_of, rows_of
from pareto_picture import OURS, draw
from torch import Tensor, nn

from ziplm_deploy.api import run_recipe
from ziplm_deploy.artifacts import write_text
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.models.shape import ModuleKind
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import Recipe, Variant, parse_recipe
from ziplm_deploy.recovery.losses import LayerOutputs
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.training import train
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.evaluate import outcomes_on
from ziplm_deploy.stages.export import export_checked
from ziplm_deploy.tasks import Task, get_task
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.record import Scores

LAYER_DROP = "layer-drop"
METHODS = (OURS, "flap", "magnitude", LAYER_DROP)
TARGETS = (2.0, 3.0)
LAYERS = (3, 2)  # that whole-layer rivals keep
FRESH = "3-layer student"
BELOW = 0.94  # of its own predicted speedup: a model of whole layers has no neighbour to correct a miss with


class EveryOther(Student):
    """A shallower student whose layer k answers for layer 2k + 1 of the teacher."""

    def __init__(self, model: nn.Module, task: Any, teacher_layers: list[int]) -> None:
        super().__init__(model, task, teacher_layers, dropout=False)
        self.own_layers = list(range(len(teacher_layers)))

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        with LayerOutputs(self.model, self.own_layers) as recorded:
            outputs = self.task.forward(self.model, batch)
        hidden = recorded.packed(batch.get("attention_mask"))
        return {"outputs": outputs, "features": self.task.features(outputs, batch), "hidden": hidden}


def every_other_layer(dense: nn.Module) -> tuple[nn.Module, list[int]]:
    """A copy with every other layer, and the numbers of those it keeps."""
    model = copy.deepcopy(dense)
    layers = layers_of(model)
    kept = list(range(1, len(layers), 2))
    chosen = [layers[index] for index in kept]
    del layers[len(kept) :]
    for index, layer in enumerate(chosen):
        layers[index] = layer
    model.config.num_hidden_layers = len(kept)  # type: ignore[union-attr]
    return model, kept


def layers_speedup(table: LatencyTable, n_layers: int, *, removed: bool) -> float:
    """What the table predicts for so many whole layers: this method gets the same latency as one more target.

    ``removed``: the others are gone; else they leave their residual additions and normalizations.
    """
    whole: dict[ModuleKind, int] = {"attention": table.shape.n_heads, "ffn": table.shape.intermediate_size}
    whole_ms = sum(table.latency_ms(kind, size) for kind, size in whole.items())
    dropped_ms = 0.0 if removed else sum(table.latency_ms(kind, 0) for kind in whole)
    return round(table.predict_speedup(n_layers * whole_ms + (table.shape.n_layers - n_layers) * dropped_ms), 2)


def targets_of(method: str, table: LatencyTable) -> list[float]:
    """At which speedups a method stands in the comparison."""
    dropped = [layers_speedup(table, n_layers, removed=False) for n_layers in LAYERS]
    student = layers_speedup(table, LAYERS[0], removed=True)
    return {
        OURS: sorted({*TARGETS, *dropped, student}),
        LAYER_DROP: dropped,
        FRESH: [student],
    }.get(method, list(TARGETS))


def method_recipe(method: str, targets: list[float], options: argparse.Namespace) -> Recipe:
    """The family's recipe: every target pruned from the dense model, then trained."""
    raw = recipe_of(options.task, options).model_dump(mode="json")
    raw |= {"name": f"pareto-{options.task}-{method}", "speedups": targets}
    raw["prune"] |= {"method": method}
    raw["recover"] |= {"mode": "one-shot"}
    raw["benchmark"] |= {"baselines": [], "median_length": False}  # methods are compared here
    return parse_recipe(raw, source=method)


def run_method(method: str, targets: list[float], options: argparse.Namespace) -> list[dict[str, Any]]:
    asked = [round(BELOW * target, 2) for target in targets] if method == LAYER_DROP else targets
    recipe = method_recipe(method, asked, options)
    report = run_recipe(recipe, ConsoleProgress())
    rows = [
        {"method": method, **row, "target": target}
        for target, row in zip(targets, rows_of(options.task, report), strict=True)
    ]
    for target, row in zip(asked, rows, strict=True):
        file = RunFolder(recipe).member(target).file(Variant.FP32)
        place = outcomes_path(row, options.work)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file.outcomes, place)
        row["outcomes_hash"] = Scores.load(file.scores).outcomes_hash
    shutil.rmtree(recipe.run_dir)
    return rows


def outcomes_path(row: dict[str, Any], work: Path) -> Path:
    """Where what a model did on every example is kept for comparisons."""
    return work / "outcomes" / f"{row['task']}-{row['method']}-{row['target']:g}.json"


def compare_pairs(rows: list[dict[str, Any]], task: Task, work: Path) -> None:
    """Add to every rival's row by how much this method scores higher at the same target, on the same examples."""
    ours = {row["target"]: row for row in rows if row["method"] == OURS}
    for row in rows:
        if row["method"] == OURS or row["target"] not in ours:
            continue
        own, rival = (
            Outcomes.load(outcomes_path(each, work), each["outcomes_hash"]) for each in (ours[row["target"]], row)
        )
        row["ours_less_this"] = compared(task, own, rival).model_dump(
            include={"difference", "low", "high", "n_examples"}
        )


def run_fresh(target: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The 3-layer student: trained with the same teacher, data, steps and losses; timed beside the dense model."""
    with tempfile.TemporaryDirectory() as folder:
        raw = method_recipe(OURS, [2.0], options).model_dump(mode="json") | {"output_dir": folder}
        run = Run(parse_recipe(raw), ConsoleProgress())
        recipe, task, dense = run.recipe, run.task, run.dense.model
        model, kept = every_other_layer(dense)
        if recipe.recover.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        objective = Objective.from_config(recipe.recover, task, run.teacher)
        record = train(
            EveryOther(model, task, kept), objective, run.data.examples, recipe.recover, Path(folder) / "checkpoints",
            seed=recipe.seed, progress=run.progress, title=FRESH,
        )  # fmt: skip
        files = {name: Path(folder) / f"{name}.onnx" for name in ("dense", FRESH)}
        for each, (name, path) in zip((dense, model.cpu().requires_grad_(True)), files.items(), strict=True):
            export_checked(run, each.eval(), path, name)
        timing = compare(files, recipe.environment, recipe.benchmark, "dense").variant(FRESH)
        outcomes = {name: outcomes_on(run, path, Variant.FP32) for name, path in files.items()}
        scores = {name: task.scores(each)[task.metric_name] for name, each in outcomes.items()}
    row = {"method": FRESH, "task": options.task, "metric": task.metric_name, "target": target}
    place = outcomes_path(row, options.work)
    place.parent.mkdir(exist_ok=True)
    return [
        {
            **row,
            "outcomes_hash": outcomes[FRESH].save(place),
            "measured_speedup": timing.speedup,
            "measured_low": timing.speedup_low,
            "measured_high": timing.speedup_high,
            "dense_score": scores["dense"],
            "score": scores[FRESH],
            **beside_dense(task, outcomes[FRESH], outcomes["dense"]),
            "training": record.model_dump(mode="json"),
        }
    ]


def run_task(options: argparse.Namespace) -> None:
    """All methods of one task, each kept as soon as it is done."""
    path = options.work / f"{options.task}.json"
    part = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
    table = LatencyTable.load(Path(options.table))
    for method in options.methods:
        done = [row["target"] for row in part["rows"] if row["method"] == method]
        targets = [target for target in targets_of(method, table) if target not in done]
        if not targets:
            continue
        part["rows"] += run_fresh(targets[0], options) if method == FRESH else run_method(method, targets, options)
        recipe = recipe_of(options.task, options)
        recover = recipe.recover.model_dump(mode="json") | {"mode": "one-shot"}
        part |= {"commit": commit(), "recover": recover, "processes": recipe.benchmark.processes}
        write_text(path, json.dumps(part, indent=1) + "\n")
    compare_pairs(part["rows"], get_task(recipe_of(options.task, options).model), options.work)
    write_text(path, json.dumps(part, indent=1) + "\n")


def wins(rows: list[dict[str, Any]]) -> Figure:
    """Share of (task, target, rival) cells that this method wins, and how sure that is."""
    ours = {(row["task"], row["target"]): row for row in rows if row["method"] == OURS}
    rivals = [row for row in rows if row["method"] != OURS]
    as_fast = [row for row in rivals if row["measured_low"] <= ours[row["task"], row["target"]]["measured_high"]]
    won, surely = (sum(row["ours_less_this"][end] > 0 for row in as_fast) for end in ("difference", "low"))
    possibly = sum(row["ours_less_this"]["high"] >= 0 for row in rivals)
    n = len(rivals)
    return Figure(won / n, "", ">= 1", n, interval=(surely / n, possibly / n))


def merge(work: Path) -> None:
    parts = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(work.glob("*.json"))}
    if not parts:
        sys.exit(f"expected results of single tasks in {work}, found none; run with --task first")
    rows = [row for part in parts.values() for row in part["rows"]]
    figures = {"wins_fraction": wins(rows)}
    about = {name: {key: value for key, value in part.items() if key != "rows"} for name, part in parts.items()}
    write_result("pareto", figures, rows, {"model": MODEL, "targets": TARGETS, "tasks": about})
    draw(rows, RESULTS / "pareto.svg")


def main() -> None:
    parser = one_task_parser(__doc__, "pareto", "optimizer steps of every model")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FRESH], default=[*METHODS, FRESH])
    options = parser.parse_args()
    options.targets = list(TARGETS)
    if options.merge:
        merge(options.work)
    elif options.table is None:
        sys.exit("expected --table with a latency table of the task's model: ziplm-deploy profile writes one")
    else:
        run_task(options)


if __name__ == "__main__":
    main()
