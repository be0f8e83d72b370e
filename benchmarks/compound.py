"""Structured pruning, 80 % zeros and INT8, alone and together, on three engines in one interleaved run.

1. ``python benchmarks/compound.py --task sst2 --run FOLDER`` takes the members of a finished family run
   (``benchmarks/family.py --keep``), makes their sparse and INT8 files for every engine (the sparse ones trained with
   their zeros held) and scores each file on the engine that runs it. Nothing is timed.
2. ``--task sst2 --time`` times all of them in one run against dense ONNX Runtime float32.
3. ``--shapes bert-base`` times shapes with random weights in the same forms: dense, and the plan of equal shares in
   every layer that a coarse latency table of ONNX Runtime says is 5x faster; ``--batch-size 32`` for throughput.
4. ``--merge`` writes ``benchmarks/results/compound.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from accuracy import beside_dense, percent_figure
from common import ROOT, Figure, commit, load_average, write_result
from family import CASES, TOWARDS_LOGITS, training_file
from shapes import OUTPUTS, SHAPES, dense_model, export
from torch import nn

from exporters import ExportSettings
from ziplm_deploy.artifacts import file_hash, write_text
from ziplm_deploy.compression.records import facts_of
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.engines.trial import Trial
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import TimedFile, compare, start_worker
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.record import BenchmarkRecord, FileTiming
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.deployed import FLOAT32
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import (
    BenchmarkConfig,
    EngineName,
    Environment,
    ExportConfig,
    ProfileConfig,
    Recipe,
    Variant,
    Workload,
    file_label,
    load_recipe,
    parse_recipe,
)
from ziplm_deploy.run.member import DENSE, ModelFile
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.compress import compress_member
from ziplm_deploy.stages.evaluate import evaluate_file, scores_of
from ziplm_deploy.stages.export import export_member
from ziplm_deploy.stages.quantize import int8_record
from ziplm_deploy.tasks import Task, get_task
from ziplm_deploy.tasks.outcomes import Outcomes

ENGINES: tuple[EngineName, ...] = ("deepsparse", "onnxruntime", "openvino")  # the first makes the sparse checkpoints
VARIANTS = (Variant.FP32, Variant.INT8, Variant.SPARSE, Variant.SPARSE_INT8)
BASELINE = "dense, onnxruntime"
STATIC = {"shapes": "static", "opset": 16}  # what all three engines take


def recipe_for(engine: EngineName, options: argparse.Namespace) -> Recipe:
    """The family's task on one engine, with every variant."""
    case, data = CASES[options.task], options.data.resolve() / CASES[options.task].folder
    train = str(data / f"{case.train}.jsonl.gz")
    losses = {key: value for key, value in TOWARDS_LOGITS.items() if key != "learning_rate"}
    return parse_recipe(
        {
            "name": options.task,
            "output_dir": str(options.work / engine),
            "model": {"path": str(options.work / f"{options.task}-dense"), "task": case.task},
            "data": {
                "calibration": train,
                "evaluation": str(data / f"{case.evaluation}.jsonl.gz"),
                "train": training_file(options.task, Path(train), options.work),
                "n_train": case.n_train,
            },
            "environment": {"engine": engine, "threads": 1, "workload": {"batch_size": 1, "seq_len": case.seq_len}},
            "speedups": [float(name.removesuffix("x")) for name in options.members],
            "export": STATIC,
            "recover": {"mode": "gradual", **losses},
            "compress": {
                "variants": list(VARIANTS[1:]),
                "sparsity": {"sparsity": options.sparsity, "pattern": options.pattern},
                "int8": {"method": "dynamic" if engine == "onnxruntime" else "static"},
                "train": {
                    "mode": "distil",
                    "max_steps": options.steps,
                    "learning_rate": options.learning_rate,
                    "precision": options.precision,
                },
            },
        },
        source=f"compound {options.task} on {engine}",
    )


def take_members(options: argparse.Namespace, recipe: Recipe) -> None:
    """Checkpoints of the family run, without its ONNX files, as members of this one."""
    for name in (DENSE, *options.members):
        target = recipe.run_dir / name
        if not target.exists():
            shutil.copytree(
                options.run / name, target, ignore=shutil.ignore_patterns("*.onnx", "accuracy*.json", "outcomes*.json")
            )


def prepare(options: argparse.Namespace) -> None:
    """Every file of every member on every engine, and its score."""
    family = load_recipe(options.run / "recipe.yaml").model_dump(mode="json", include={"speedups", "dense", "recover"})
    dense = options.work / f"{options.task}-dense"
    if not dense.exists():
        source = options.run / "dense-checkpoint"
        shutil.copytree(source if source.exists() else options.model, dense)
    rows: list[dict[str, Any]] = []
    first, *_ = options.engines
    for engine in options.engines:
        recipe = recipe_for(engine, options)
        if engine != first and not recipe.run_dir.exists():  # zeros and their training are the same everywhere
            shutil.copytree(recipe_for(first, options).run_dir, recipe.run_dir)
        take_members(options, recipe)
        rows += files_of(Run(recipe, ConsoleProgress()))
    compare_scores(rows, get_task(recipe.model))
    settings = {"compress": recipe.model_dump(mode="json")["compress"], "family": family}
    part = {"commit": commit(), "rows": rows, "settings": settings}
    write_text(options.work / f"{options.task}.json", json.dumps(part, indent=1) + "\n")


def files_of(run: Run) -> list[dict[str, Any]]:
    """Make and score all files of a run; one row each."""
    environment, metric = run.recipe.environment, run.task.metric_name
    for member in run.members:
        export_member(run, member, member.folder)
        compress_member(run, member)
    rows = []
    dense = TimedFile(run.dense_member.file(Variant.FP32).path, environment.engine)
    answers = run.answers.take(dense.path, Variant.FP32, environment.engine)
    with answers as dense_answers, Trial(lambda: start_worker(dense, environment)) as trial:
        for member, variant in itertools.product(run.members, VARIANTS):
            file = member.file(variant)
            row = file_row(run, file)
            try:
                trial.run(file.path)
            except EngineError:
                rows.append(row | {"refused": True})
                continue
            evaluate_file(run, file, dense_answers)
            rows.append(row | {"score": scores_of(run, file)[metric], "metric": metric, "outcomes": str(file.outcomes)})
    return rows


def compare_scores(rows: list[dict[str, Any]], task: Task) -> None:
    """Put every score beside that of dense float32 ONNX Runtime, example by example."""
    scored = {title_of(row): Path(row.pop("outcomes")) for row in rows if "score" in row}
    outcomes = {title: Outcomes.load(path, file_hash(path)) for title, path in scored.items()}
    for row in rows:
        if (title := title_of(row)) in outcomes:
            row |= beside_dense(task, outcomes[title], outcomes[BASELINE])


def file_row(run: Run, file: ModelFile) -> dict[str, Any]:
    """What is known of a file before an engine has run it."""
    sparsity = SparsityRecord.load(file.member.sparsity_record) if file.variant.is_sparse else None
    return {
        "task": run.recipe.name,
        "member": file.member.name,
        "variant": file.variant,
        "engine": run.recipe.environment.engine,
        "path": str(file.path),
        "onnx_bytes": file.path.stat().st_size,
        "facts": facts_of(sparsity, int8_record(file)),
    }


def time_files(options: argparse.Namespace) -> None:
    """One interleaved run over everything that was prepared for a task."""
    path = options.work / f"{options.task}.json"
    if not path.exists():
        sys.exit(f"expected prepared files in {path}, found none; run with --task and --run first")
    part, load = json.loads(path.read_text("utf-8")), load_average()
    runnable = {title_of(row): row for row in part["rows"] if not row.get("refused")}
    subjects = {title: TimedFile(Path(row["path"]), row["engine"]) for title, row in runnable.items()}
    record = timed(subjects, options)
    for title, row in runnable.items():
        row |= timing_row(record.variant(title))
    part["timing"] = timing_settings(record, load)
    write_text(path, json.dumps(part, indent=1) + "\n")


def title_of(row: dict[str, Any]) -> str:
    """Name of a row's file in the benchmark."""
    return f"{file_label(row['member'], Variant(row['variant']))}, {row['engine']}"


def timed(subjects: dict[str, TimedFile], options: argparse.Namespace) -> BenchmarkRecord:
    environment = Environment(threads=1, workload=Workload(batch_size=options.batch_size, seq_len=128))
    config = BenchmarkConfig(
        rounds=options.rounds,
        runs_per_round=options.runs_per_round,
        max_seconds=options.max_seconds,
        max_processes=options.max_processes,
    )
    return compare(subjects, environment, config, BASELINE, ConsoleProgress().step)


def timing_row(result: FileTiming, batch_size: int = 1) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "p50_ms": result.p50_ms,
        "examples_per_second": 1000 * batch_size / result.p50_ms,
        "speedup": result.speedup,
        "low": result.speedup_low,
        "high": result.speedup_high,
        "peak_memory_bytes": result.peak_memory_bytes,
        "engine_version": result.engine_version,
        "n": len(result.samples_ms),
    }


def timing_settings(record: BenchmarkRecord, load: float) -> dict[str, Any]:
    return {
        "environment": record.environment.fingerprint,
        "aa": [record.aa_ratio, record.aa_low, record.aa_high],
        "rounds_of_processes": record.rounds_of_processes,
        "load_average_before": load,
    }


def uniform_sizes(table: LatencyTable, speedup: float) -> dict[str, int]:
    """The largest equal share of heads and FFN columns in every layer that the table says is this much faster."""
    shape = table.shape
    heads, widths = (sorted(table.sizes(kind), reverse=True) for kind in ("attention", "ffn"))
    for share in (step / 200 for step in range(200, 0, -1)):
        n_heads = next(size for size in heads if size <= max(1, share * shape.n_heads))
        width = next(size for size in widths if size <= share * shape.intermediate_size)
        sizes = {
            f"{k}.{kind}": size
            for k in range(shape.n_layers)
            for kind, size in (("attention", n_heads), ("ffn", width))
        }
        if table.dense.median_ms / table.predict_ms(sizes) >= speedup:
            return sizes
    sys.exit(f"expected a uniform plan of {speedup:g}x in this table, found none")


def time_shapes(name: str, options: argparse.Namespace) -> None:
    """One shape in every form on every engine; random weights, so no accuracy."""
    dense, load = dense_model(SHAPES[name]), load_average()
    environment = Environment(threads=1, workload=Workload(batch_size=options.batch_size, seq_len=128))
    coarse = ProfileConfig(width_ratio=0.8, max_seconds=60)
    request = TableRequest(dense, OUTPUTS, environment, coarse, ExportConfig())
    sizes = uniform_sizes(measure_table(request), 5.0)
    subjects: dict[str, TimedFile] = {}
    rows: list[dict[str, Any]] = []
    for engine in options.engines:
        with Trial(partial(start_worker, TimedFile(options.work, engine), environment)) as trial:
            for member, variant in itertools.product((DENSE, "5x"), options.variants):
                path = options.work / name / engine / f"{file_label(member, variant)}.onnx"
                export_form(random_resized(dense, sizes if member != DENSE else {}), engine, variant, path, options)
                row = {"task": f"{name} shapes, batch {options.batch_size}", "member": member, "variant": variant}
                rows.append(row | {"engine": engine})
                try:
                    trial.run(path)
                except EngineError:
                    rows[-1]["refused"] = True
                    continue
                subjects[title_of(rows[-1])] = TimedFile(path, engine)
    record = timed(subjects, options)
    for row in rows:
        if (title := title_of(row)) in subjects:
            row |= timing_row(record.variant(title), options.batch_size)
    part = {"commit": commit(), "rows": rows, "sizes": sizes, "timing": timing_settings(record, load)}
    write_text(options.work / f"{name}-batch-{options.batch_size}.json", json.dumps(part, indent=1) + "\n")
    shutil.rmtree(options.work / name)


def export_form(
    model: nn.Module, engine: EngineName, variant: Variant, path: Path, options: argparse.Namespace
) -> None:
    """The ONNX file of ``model`` as this engine would get it in a run whose target is this variant."""
    options.task = "sst2"  # any recipe: only its compression is read
    raw = recipe_for(engine, options).model_dump(mode="json")
    raw["compress"]["target"] = variant
    settings = ExportSettings("static", 16, options.batch_size, 128)
    export(model, path, settings, target_treatment(parse_recipe(raw)) or FLOAT32)


def best(rows: list[dict[str, Any]], percent: float) -> dict[str, Figure]:
    """The fastest file that keeps this share of the dense score, in the task where that is least, and what it keeps.

    A file is chosen by one half of the evaluation examples, and what it keeps is reported on the other: its interval
    may reach one point below ``percent``.
    """
    goal = {99.0: ">= 8", 95.0: ">= 20"}[percent]
    found = []
    for task in dict.fromkeys(row["task"] for row in rows if "score" in row):
        kept = [row for row in rows if row["task"] == task and row.get("percent_on_choosing_half", 0) >= percent]
        found.append(max(kept, key=lambda row: row["speedup"]))
    row = min(found, key=lambda row: row["speedup"])
    reported = row["on_reporting_half"]
    kept_percent = percent_figure(reported, f">= {percent - 1:g}", reported["n_examples"])
    speedup, title = (row["low"], row["high"]), f"best_speedup_at_{percent:g}_percent"
    return {
        title: Figure(row["speedup"], "x", goal, row["n"], speedup, interval=speedup),
        f"{title}_keeps": kept_percent,
    }


def merge(work: Path) -> None:
    parts = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(work.glob("*.json"))}
    rows = [row for part in parts.values() for row in part["rows"]]
    if not all("percent_on_choosing_half" in row for row in rows if "score" in row):
        sys.exit(f"expected scores compared with dense in {work}, found some without; run --task and --run again")
    if not rows or not all("speedup" in row or row.get("refused") for row in rows):
        sys.exit(f"expected timed files in {work}, found {len(rows)} rows, not all timed; run --task and --time first")
    figures = best(rows, 99.0) | best(rows, 95.0)
    for task in dict.fromkeys(row["task"] for row in rows if " shapes, " in row["task"]):
        own = [row for row in rows if row["task"] == task and row["member"] == "5x" and not row.get("refused")]
        top = max(own, key=lambda row: row["speedup"])
        shape, _, batch = task.partition(" shapes, ")
        title, goal = f"{shape.replace('-', '_')}_5x_compound_speedup", ">= 15" if shape == "bert-base" else "report"
        if batch != "batch 1":
            title, goal = f"{title}_{batch.replace(' ', '_')}", "report"
        interval = (top["low"], top["high"])
        figures[title] = Figure(top["speedup"], "x", goal, top["n"], interval, interval=interval)
    about = {name: {key: value for key, value in part.items() if key != "rows"} for name, part in parts.items()}
    write_result("compound", figures, [{k: v for k, v in row.items() if k != "path"} for row in rows], about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(CASES))
    parser.add_argument("--run", type=Path, help="finished family run whose members are compressed")
    parser.add_argument("--model", type=Path, help="dense checkpoint of that run, if the run did not train it itself")
    parser.add_argument("--members", nargs="+", default=["2x", "3x", "6x"])
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="with onnxruntime, of which dense is"
    )
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--shapes", choices=list(SHAPES), help="time a shape with random weights")
    parser.add_argument(
        "--variants", nargs="+", type=Variant, choices=VARIANTS, default=list(VARIANTS), help="forms of --shapes"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compound")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--pattern", choices=("unstructured", "block4"), default="unstructured")
    parser.add_argument("--steps", type=int, default=400, help="training steps of every sparse model")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=1, help="of --shapes")
    parser.add_argument("--rounds", type=int, default=BenchmarkConfig().rounds)
    parser.add_argument("--runs-per-round", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=600.0)
    parser.add_argument("--max-processes", type=int, default=BenchmarkConfig().max_processes, help="a file")
    parser.add_argument("--merge", action="store_true")
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.merge:
        merge(options.work)
    elif options.shapes:
        time_shapes(options.shapes, options)
    elif options.time:
        time_files(options)
    elif options.run:
        prepare(options)
    else:
        parser.error("expected --run, --time, --shapes or --merge, found none of them")


if __name__ == "__main__":
    main()
