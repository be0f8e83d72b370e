"""Does the latency table predict whole causal language models? Random non-uniform models, predicted against measured.

For each shape a table of one workload (a prompt, then tokens one by one) is measured, models between 1.2x and 4x are
drawn from its levels, exported and timed by the product's own benchmark. Besides the whole request each of its calls is
a row: the prefill, and decode at each cache length that is timed.
``worst_deviation_percent`` and ``median_deviation_percent``: of |predicted / measured - 1| over models and calls, the
whole request included; their intervals are the same of the nearest and the farthest speedup in each interval, the
spread that of the shapes. The same without the table's correction is recorded beside it (``…_of_sums``).

``--gguf Q8_0`` (or Q4_0, F16) does all this in llama.cpp, with GGUF files of such weights; shapes must be of the Llama
kind. Its result is ``decoder_additivity_llamacpp``. ``--int8``: cells and models in dynamic INT8 throughout, the form
that ONNX Runtime runs fastest, head included; speedups are over the dense float32 file (``decoder_additivity_int8``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from additivity import benchmark_config, draw_sizes, figures_of, profile_config
from common import load_average, write_result
from decoder_shapes import OUTPUTS, SHAPES, dense_decoder, export_decoder

from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.deployed import FLOAT32, Treatment, export_settings
from ziplm_deploy.models.gguf_export import write_to_be_timed
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.recipe import Environment, ExportConfig, GgufType, Workload, parse_recipe

DEFAULT_SHAPES = ["gpt2-124m", "smollm2-135m"]
SLOWEST, FASTEST, OF_LARGEST = 1.2, 4.0, 0.8  # speedups of the models drawn; of the largest that the table knows


def run_shape(shape: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, one a model and call, and what else the shape's run was."""
    started, load_before = time.monotonic(), load_average()
    workload = Workload(prefill=options.prefill, decode=options.decode)
    engine = "onnxruntime" if options.gguf is None else "llamacpp"
    environment = Environment(engine=engine, threads=options.threads, workload=workload, huge_pages=options.huge_pages)
    export = ExportConfig(gguf=options.gguf)
    dense = dense_decoder(shape)
    treatment = int8_treatment(environment) if options.int8 else FLOAT32
    request = TableRequest(dense, OUTPUTS, environment, profile_config(options), export, treatment=treatment)
    table = measure_table(request)
    print(f"{shape}: table in {table.total_seconds:.0f} s, noise {table.noise}", file=sys.stderr)
    unpruned = table.dense.median_ms / (table.unpruned or table.dense).median_ms  # what INT8 alone brings
    fastest = min(FASTEST * unpruned, OF_LARGEST * table.largest_speedup())
    targets = np.geomspace(SLOWEST * unpruned, fastest, options.models)
    generator = np.random.default_rng(options.seed)
    plans = {f"model {index}": draw_sizes(table, target, generator) for index, target in enumerate(targets)}
    settings = export_settings(export, workload)
    with tempfile.TemporaryDirectory(prefix="ziplm-additivity-") as folder:
        files = {name: Path(folder) / name.replace(" ", "-") for name in ("dense", *plans)}
        for name, path in files.items():
            model = dense if name == "dense" else random_resized(dense, plans[name])
            if options.gguf is None:
                export_decoder(model, path, settings, request.form, FLOAT32 if name == "dense" else treatment)
            else:
                write_to_be_timed(model, path, options.gguf)
        record = compare(files, environment, benchmark_config(options), "dense")
    rows = [row for name, sizes in plans.items() for row in rows_of(shape, name, sizes, table, record)]
    about = {
        "shape": shape,
        "environment": environment.describe(),
        "form": options.gguf or treatment.description,
        "load_average_before": load_before,
        "table_seconds": table.total_seconds,
        "table_noise": table.noise,
        "stack_megabytes": request.grid.stack_bytes / 1e6,
        "aa_ratio": [record.aa_ratio, record.aa_low, record.aa_high],
        "rounds_of_processes": record.rounds_of_processes,
        "total_seconds": time.monotonic() - started,
    }
    return rows, about


def int8_treatment(environment: Environment) -> Treatment:
    """Dynamic INT8 as a recipe's target has it, embeddings in 8 bits."""
    recipe = parse_recipe(
        {
            "name": "additivity",
            "model": {"path": "none", "task": "text-generation"},
            "environment": environment.model_dump(exclude_unset=True),
            "speedups": [2],
            "compress": {"variants": ["int8"], "target": "int8"},
        }
    )
    return target_treatment(recipe) or FLOAT32


def rows_of(
    shape: str, model: str, sizes: dict[str, int], table: LatencyTable, record: BenchmarkRecord
) -> list[dict[str, Any]]:
    """The whole request, and each call of it."""
    calls = table.environment.workload.calls
    measured = record.variant(model)
    found = [(None, "request", measured.speedup, measured.speedup_low, measured.speedup_high, measured.p50_ms)]
    for place, (call, timing) in enumerate(zip(calls, measured.calls, strict=True)):
        found.append((place, call.describe(), timing.speedup, timing.speedup_low, timing.speedup_high, timing.p50_ms))
    rows = []
    for place, name, speedup, low, high, ms in found:
        dense_ms = table.dense.median_ms_of(place)
        predicted, of_sums = dense_ms / table.predict_ms(sizes, place), dense_ms / table.sum_ms(sizes, place)
        rows.append(
            {
                "case": f"{shape}, {name}",
                "model": model,
                "predicted_speedup": predicted,
                "predicted_speedup_of_sums": of_sums,
                "measured_speedup": speedup,
                "measured_low": low,
                "measured_high": high,
                "measured_ms": ms,
                "deviation_percent": 100 * abs(predicted / speedup - 1),
                "deviation_percent_of_sums": 100 * abs(of_sums / speedup - 1),
                "sizes": sizes if place is None else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES)
    parser.add_argument("--models", type=int, default=12, help="random models a shape")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=64)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--gguf", choices=get_args(GgufType), help="in llama.cpp, with weights of this type")
    forms.add_argument("--int8", action="store_true", help="in dynamic INT8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--huge-pages", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--precision", type=float, default=0.006, help="of the table's medians")
    parser.add_argument("--table-rounds", type=int, default=60)
    parser.add_argument("--table-seconds", type=float, default=240.0)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--runs-per-round", type=int, default=1)
    parser.add_argument("--benchmark-seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/decoder_additivity.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    shapes = []
    for shape in options.shapes:
        of_shape, about = run_shape(shape, options)
        rows += of_shape
        shapes.append(about)
        print(f"{shape}: worst {max(row['deviation_percent'] for row in of_shape):.2f} %", file=sys.stderr)
    settings = {
        "shapes": shapes,
        "models_per_shape": options.models,
        "profile": profile_config(options).model_dump(mode="json"),
        "benchmark": benchmark_config(options).model_dump(),
        "seed": options.seed,
    }
    goals = {"worst": "<= 5", "median": "<= 2"}
    name = "decoder_additivity" + ("_llamacpp" if options.gguf else "_int8" if options.int8 else "")
    write_result(name, figures_of(rows, goals), rows, settings, options.output)


if __name__ == "__main__":
    main()
