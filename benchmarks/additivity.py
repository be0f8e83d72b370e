"""Does the latency table predict whole models? Random non-uniform models, predicted against measured speedup.

For each case (shape and environment) a table is measured, models between 1.5x and 10x are drawn from its levels,
exported and timed by the product's own benchmark. Predicted speedup = the table's dense latency / (base + all cells,
corrected by the table's few whole models, which are other ones than those drawn here).
Figures: ``worst_deviation_percent`` and ``median_deviation_percent`` of |predicted / measured - 1| over all models;
their intervals are the same of the nearest and the farthest speedup in each model's interval. The spread of the first
is the range of the cases' worst, that of the second of the cases' medians.
With ``--compound`` cells and models are sparse or INT8, on the engine that serves such files; speedups are over dense
float32 ONNX Runtime (``compound_additivity``).
The same without the correction is recorded beside it (``…_of_sums``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Figure, load_average, write_result
from shapes import OUTPUTS, SHAPES, dense_model, export

from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.latency.benchmark import TimedFile, compare
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.statistics import Floats
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.deployed import FLOAT32, Treatment, export_settings
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.recipe import BenchmarkConfig, Environment, ExportConfig, ProfileConfig, Workload, parse_recipe

OPTIONAL_ENGINE = "openvino"
SLOWEST, FASTEST = 1.5, 10.0
# A drawn model is near enough to its target; what counts is its own prediction, not the target.
NEAR = 0.02


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str
    environment: Environment
    compress: dict[str, Any] = dataclasses.field(default_factory=dict)  # section of a recipe; its target is timed

    @property
    def name(self) -> str:
        words = (self.shape, self.environment.describe(), self.treatment.description)
        return ", ".join(filter(None, words))

    @property
    def treatment(self) -> Treatment:
        """What else is done to cells and models before they are timed."""
        static = {"shapes": "static", "opset": 16}
        recipe = parse_recipe(
            {
                "name": "additivity",
                "model": {"path": "none", "task": "sentence-similarity"},
                "environment": self.environment.model_dump(),
                "speedups": [2],
                "export": static if self.environment.engine == "deepsparse" else {},
                "compress": self.compress,
            }
        )
        return target_treatment(recipe) or FLOAT32


CASES = {
    "bert-base-latency": Case("bert-base", Environment(threads=1, workload=Workload(batch_size=1, seq_len=128))),
    "minilm-latency": Case("minilm-l6", Environment(threads=1, workload=Workload(batch_size=1, seq_len=128))),
    "minilm-throughput": Case("minilm-l6", Environment(threads=2, workload=Workload(batch_size=16, seq_len=128))),
    "tiny": Case("tiny", Environment(threads=1, workload=Workload(batch_size=1, seq_len=32))),
}
DEFAULT_CASES = ["bert-base-latency", "minilm-latency", "minilm-throughput"]
STATIC_INT8 = {"method": "static", "per_channel": False}
COMPOUND_CASES = {
    "onnxruntime-int8": Case("minilm-l6", Environment(), {"variants": ["int8"], "target": "int8"}),
    "deepsparse-sparse": Case(
        "minilm-l6", Environment(engine="deepsparse"), {"variants": ["sparse"], "target": "sparse"}
    ),
    "deepsparse-sparse-int8": Case(
        "minilm-l6",
        Environment(engine="deepsparse"),
        {"variants": ["sparse-int8"], "target": "sparse-int8", "int8": STATIC_INT8},
    ),
    "openvino-int8": Case(
        "minilm-l6", Environment(engine="openvino"), {"variants": ["int8"], "target": "int8", "int8": STATIC_INT8}
    ),
}
ALL_CASES = CASES | COMPOUND_CASES


def draw_sizes(table: LatencyTable, speedup: float, generator: np.random.Generator) -> dict[str, int]:
    """Random sizes whose predicted speedup is within 2 % of ``speedup``, or as near as single steps come.

    Starts from random levels and moves one random module one level at a time.
    """
    levels = {kind: table.sizes(kind) for kind in ("attention", "ffn")}
    names = [f"{layer}.{kind}" for layer in range(table.shape.n_layers) for kind in levels]
    places = {name: int(generator.integers(len(levels[name.split(".")[1]]))) for name in names}

    def sizes() -> dict[str, int]:
        return {name: levels[name.split(".")[1]][place] for name, place in places.items()}

    for _ in range(20_000):
        predicted = table.dense.median_ms / table.predict_ms(sizes())
        if abs(predicted / speedup - 1) <= NEAR:
            break
        name = str(generator.choice(names))
        step = -1 if predicted < speedup else 1
        places[name] = int(np.clip(places[name] + step, 0, len(levels[name.split(".")[1]]) - 1))
    return sizes()


def targets_of(table: LatencyTable, n_models: int) -> Floats:
    """Speedups to draw models for: 1.5x to 10x of what the form reaches unpruned, as far as the table allows."""
    unpruned = table.dense.median_ms / (table.unpruned or table.dense).median_ms
    largest = table.dense.median_ms / table.predict_ms(
        {f"{layer}.{kind}": 0 for layer in range(table.shape.n_layers) for kind in ("attention", "ffn")}
    )
    return np.geomspace(SLOWEST * unpruned, min(FASTEST * unpruned, 0.8 * largest), n_models)


def run_case(case: Case, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows (one a model) and what else the case was."""
    shapes, opset = ("static", 16) if case.environment.engine == "deepsparse" else (options.shapes, 17)
    config, treatment = ExportConfig(shapes=shapes, opset=opset), case.treatment
    started, load_before = time.monotonic(), load_average()
    dense = dense_model(SHAPES[case.shape])
    request = TableRequest(
        dense,
        OUTPUTS,
        case.environment,
        profile_config(options),
        config,
        treatment=treatment,
        baseline_engine="onnxruntime",
    )
    table = measure_table(request)
    print(f"{case.name}: table in {table.total_seconds:.0f} s, noise {table.noise}", file=sys.stderr)
    generator = np.random.default_rng(options.seed)
    targets = targets_of(table, options.models)
    plans = {f"model {index}": draw_sizes(table, target, generator) for index, target in enumerate(targets)}
    with tempfile.TemporaryDirectory(prefix="ziplm-additivity-") as folder:
        settings = export_settings(config, case.environment.workload)
        subjects = {"dense": TimedFile(export(dense, Path(folder) / "dense.onnx", settings), "onnxruntime")}
        for name, sizes in plans.items():
            path = Path(folder) / f"{name.replace(' ', '-')}.onnx"
            subjects[name] = TimedFile(export(random_resized(dense, sizes), path, settings, treatment))
        record = compare(subjects, case.environment, benchmark_config(options), "dense")
    rows = [
        row(case, name, float(target), plans[name], table, record) for name, target in zip(plans, targets, strict=True)
    ]
    about = {
        "case": case.name,
        "load_average_before": load_before,
        "table_seconds": table.total_seconds,
        "table_noise": table.noise,
        "table_dense_ms": table.dense.median_ms,
        "benchmark_dense_ms": record.variant("dense").p50_ms,
        "aa_ratio": [record.aa_ratio, record.aa_low, record.aa_high],
        "rounds_of_processes": record.rounds_of_processes,
        "benchmark_seconds": record.seconds,
        "total_seconds": time.monotonic() - started,
    }
    return rows, about


def row(
    case: Case, name: str, target: float, sizes: dict[str, int], table: LatencyTable, record: BenchmarkRecord
) -> dict[str, Any]:
    measured = record.variant(name)
    predicted = table.dense.median_ms / table.predict_ms(sizes)
    predicted_of_sums = table.dense.median_ms / table.sum_ms(sizes)
    return {
        "case": case.name,
        "model": name,
        "drawn_for_speedup": target,
        "predicted_speedup": predicted,
        "predicted_speedup_of_sums": predicted_of_sums,
        "measured_speedup": measured.speedup,
        "measured_low": measured.speedup_low,
        "measured_high": measured.speedup_high,
        "deviation_percent": 100 * abs(predicted / measured.speedup - 1),
        "deviation_percent_of_sums": 100 * abs(predicted_of_sums / measured.speedup - 1),
        "predicted_ms": table.predict_ms(sizes),
        "measured_ms": measured.p50_ms,
        "n": measured.latency.n,
        "sizes": sizes,
    }


def figures_of(rows: list[dict[str, Any]], goals: dict[str, str]) -> dict[str, Figure]:
    """Figures over all cases but those of the optional engine, which has figures of its own without goals."""
    extra = [entry for entry in rows if f", {OPTIONAL_ENGINE}," in entry["case"]]
    figures = {}
    for suffix, own, its_goals in (
        ("", [entry for entry in rows if entry not in extra], goals),
        (f"_{OPTIONAL_ENGINE}", extra, {}),
    ):
        for of_sums in ("", "_of_sums"):
            by_case: dict[str, list[float]] = {}
            for entry in own:
                by_case.setdefault(entry["case"], []).append(entry[f"deviation_percent{of_sums}"])
            everything = [deviation for deviations in by_case.values() for deviation in deviations]
            bounds = np.array([deviation_bounds(entry, of_sums) for entry in own])
            for name, summary in (("worst", np.max), ("median", np.median)) if own else ():
                per_case = [float(summary(deviations)) for deviations in by_case.values()]
                figures[f"{name}_deviation_percent{of_sums}{suffix}"] = Figure(
                    float(summary(everything)),
                    "%",
                    "" if of_sums else its_goals.get(name, ""),
                    len(everything),
                    (min(per_case), max(per_case)),
                    (float(summary(bounds[:, 0])), float(summary(bounds[:, 1]))),
                )
    return figures


def deviation_bounds(entry: dict[str, Any], of_sums: str) -> tuple[float, float]:
    """Deviation of a prediction, in percent, from the nearest and the farthest speedup in what was measured."""
    predicted = entry[f"predicted_speedup{of_sums}"]
    low, high = (100 * (predicted / entry[f"measured_{end}"] - 1) for end in ("high", "low"))
    return (0.0 if low < 0 < high else min(abs(low), abs(high))), max(abs(low), abs(high))


def profile_config(options: argparse.Namespace) -> ProfileConfig:
    return ProfileConfig(
        precision=options.precision,
        min_rounds=min(30, options.table_rounds),
        max_rounds=options.table_rounds,
        max_seconds=options.table_seconds,
    )


def benchmark_config(options: argparse.Namespace) -> BenchmarkConfig:
    return BenchmarkConfig(
        rounds=options.rounds, runs_per_round=options.runs_per_round, max_seconds=options.benchmark_seconds
    )


def kept(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and descriptions of the cases in the result file that are not measured now: each was a run of its own."""
    result = json.loads((options.output or RESULTS / f"{result_name(options)}.json").read_text(encoding="utf-8"))
    again = {ALL_CASES[name].name for name in options.cases}
    rows = [entry for entry in result["rows"] if entry["case"] not in again]
    return rows, [about for about in result["settings"]["cases"] if about["case"] not in again]


def result_name(options: argparse.Namespace) -> str:
    return "compound_additivity" if options.compound else "additivity"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=sorted(ALL_CASES), help="none, with --keep: only the figures")
    parser.add_argument("--compound", action="store_true", help="tables and models in sparse and INT8 forms")
    parser.add_argument("--models", type=int, default=24, help="random models a case")
    parser.add_argument("--shapes", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--precision", type=float, default=0.006, help="of the table's medians")
    parser.add_argument("--table-rounds", type=int, default=100)
    parser.add_argument("--table-seconds", type=float, default=150.0)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--runs-per-round", type=int, default=1)
    parser.add_argument("--benchmark-seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/additivity.json")
    parser.add_argument("--keep", action="store_true", help="keep the other cases of the result file that is there")
    options = parser.parse_args()
    if options.cases is None:
        options.cases = list(COMPOUND_CASES) if options.compound else DEFAULT_CASES
    rows, cases = kept(options) if options.keep else ([], [])
    for name in options.cases:
        case_rows, about = run_case(ALL_CASES[name], options)
        rows += case_rows
        cases.append(about)
        print(f"{name}: worst {max(entry['deviation_percent'] for entry in case_rows):.2f} %", file=sys.stderr)
    settings = {
        "cases": cases,
        "models_per_case": options.models,
        "export_shapes": options.shapes,
        "profile": profile_config(options).model_dump(mode="json"),
        "benchmark": benchmark_config(options).model_dump(),
        "seed": options.seed,
    }
    goals = {"worst": "<= 5", "median": "<= 2.5"} if options.compound else {"worst": "<= 3", "median": "<= 1.5"}
    write_result(result_name(options), figures_of(rows, goals), rows, settings, options.output)


if __name__ == "__main__":
    main()
