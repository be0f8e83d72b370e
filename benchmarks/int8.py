"""INT8 three ways and by both back ends, against what users do without this package: accuracy lost and speedup.

``python benchmarks/int8.py --task banking77 --model CHECKPOINT --members RUN/dense RUN/3x`` quantizes members of a
finished family run (``benchmarks/family.py --keep``): dynamic, static, QAT, neural-compressor; beside them
``optimum-cli onnxruntime quantize`` (``pip install ".[optimum]"``) and NNCF, both with their defaults. All files are
scored on the engine that runs them and timed in one interleaved run, batch 1, 128 tokens, 1 thread. Figures: accuracy
lost in points, on the half of the examples by which no setting kept linears in float32, and speedup over the float32
file of the same model on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy import beside_dense
from common import ROOT, Figure, load_average, write_result
from family import CASES, TOWARDS_LOGITS, training_file

from ziplm_deploy.compression.records import Int8Record
from ziplm_deploy.latency.benchmark import TimedFile, compare
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import BenchmarkConfig, EngineName, Environment, Recipe, Variant, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.evaluate import outcomes_on
from ziplm_deploy.stages.export import export_member
from ziplm_deploy.stages.quantize import quantize_file
from ziplm_deploy.tasks.outcomes import Outcomes

SETTINGS: dict[str, tuple[EngineName, dict[str, Any]]] = {
    "dynamic": ("onnxruntime", {"method": "dynamic"}),
    "static, min-max": ("onnxruntime", {"method": "static"}),
    "static, percentile": ("onnxruntime", {"method": "static", "ranges": "percentile"}),
    "static, OpenVINO": ("openvino", {"method": "static"}),
    "QAT": ("onnxruntime", {"method": "qat"}),
    "neural-compressor, dynamic": ("onnxruntime", {"method": "dynamic", "backend": "neural-compressor"}),
    "neural-compressor, static": ("onnxruntime", {"method": "static", "backend": "neural-compressor"}),
}
FLOAT, OPTIMUM, NNCF = "float32", "optimum-cli", "NNCF (OpenVINO)"


def recipe_of(name: str, engine: EngineName, int8: dict[str, Any], options: argparse.Namespace, folder: Path) -> Recipe:
    case, data = CASES[options.task], options.data.resolve() / CASES[options.task].folder
    train = data / f"{case.train}.jsonl.gz"
    losses = {key: value for key, value in TOWARDS_LOGITS.items() if key != "learning_rate"}
    training = {"max_steps": options.steps, "learning_rate": options.learning_rate, "precision": options.precision}
    mode = "distil" if int8.get("method") == "qat" else "none"
    return parse_recipe(
        {
            "name": name,
            "output_dir": str(folder),
            "model": {"path": str(options.model), "task": case.task},
            "data": {
                "calibration": str(train),
                "evaluation": str(data / f"{case.evaluation}.jsonl.gz"),
                "train": training_file(options.task, train, folder),
            },
            "environment": {"engine": engine},
            "speedups": [2],
            "recover": losses,
            "compress": {"variants": ["int8"], "train": {"mode": mode, **training}, "int8": int8},
        }
    )


def float_file(options: argparse.Namespace, source: Path, folder: Path) -> tuple[Run, Path]:
    """The float32 file of a member, and the run it stands in."""
    run = Run(recipe_of("float", "onnxruntime", {}, options, folder), ConsoleProgress())
    member = run.dense_member
    shutil.copytree(source, member.folder, ignore=shutil.ignore_patterns("*.onnx", "accuracy*.json", "outcomes*.json"))
    export_member(run, member, member.folder)
    return run, member.file(Variant.FP32).path


def ours(title: str, options: argparse.Namespace, source: Path, folder: Path) -> tuple[Path, Outcomes, dict[str, Any]]:
    """File, outcomes and facts of one of our settings."""
    engine, int8 = SETTINGS[title]
    name = title.replace(" ", "-").replace(",", "")
    run = Run(recipe_of(name, engine, int8, options, folder), ConsoleProgress())
    file = run.dense_member.file(Variant.INT8)
    shutil.copytree(source, file.folder, dirs_exist_ok=True)
    quantize_file(run, file)
    record = Int8Record.load(file.int8_record)
    facts = {"fp32_linears": len(record.fp32_linears), "within_budget": record.within_budget, "tried": record.scores}
    facts["n_choosing"] = record.n_choosing
    return file.path, outcomes_on(run, file.path, Variant.INT8), {"engine": engine, **facts}


def by_optimum(source: Path, folder: Path) -> Path:
    """``optimum-cli onnxruntime quantize`` as its documentation shows it for this kind of CPU."""
    target = folder / "optimum"
    executable, flags = str(Path(sys.executable).with_name("optimum-cli")), machine_info().isa_flags
    setting = next((flag for flag in ("avx512_vnni", "avx512f") if flag in flags), "avx2").removesuffix("f")
    command = ["onnxruntime", "quantize", "--onnx_model", str(source), f"--{setting}", "-o", str(target)]
    subprocess.run([executable, *command], check=True, capture_output=True, text=True)
    return next(target.glob("*.onnx"))


def by_nncf(run: Run, source: Path, folder: Path) -> Path:
    """``nncf.quantize`` with its model type for Transformers, on the same calibration examples."""
    import nncf
    import onnx

    encoded = run.data.encode(run.data.ranges_rows, 1)
    batches = [{key: value.numpy() for key, value in batch.items()} for batch in encoded]
    inputs = {entry.name for entry in onnx.load(str(source), load_external_data=False).graph.input}
    dataset = nncf.Dataset([{key: value for key, value in batch.items() if key in inputs} for batch in batches])
    model = nncf.quantize(
        onnx.load(str(source)), dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )
    path = folder / "nncf.onnx"
    onnx.save(model, str(path))
    return path


def measure(title: str, source: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one model in every form."""
    run, plain = float_file(options, source, folder)
    dense = outcomes_on(run, plain, Variant.FP32)
    found: dict[str, tuple[Path, EngineName, Outcomes, dict[str, Any]]] = {FLOAT: (plain, "onnxruntime", dense, {})}
    for setting in options.settings:
        path, outcomes, facts = ours(setting, options, plain.parent, folder)
        found[setting] = (path, facts.pop("engine"), outcomes, facts)
    rivals: dict[str, tuple[EngineName, Callable[[], Path]]] = {
        OPTIMUM: ("onnxruntime", lambda: by_optimum(plain.parent, folder)),
        NNCF: ("openvino", lambda: by_nncf(run, plain, folder)),
    }
    for name, (engine, make) in rivals.items():
        path = make()
        found[name] = (path, engine, outcomes_on(run, path, Variant.INT8, engine=engine), {})
    subjects = {name: TimedFile(path, engine) for name, (path, engine, *_) in found.items()}
    config = BenchmarkConfig(rounds=options.rounds, max_seconds=300)
    progress = ConsoleProgress()
    progress.stage(f"benchmark: all forms of {title}, interleaved", 1, 1)
    record = compare(subjects, Environment(), config, FLOAT, progress.step)
    rows = []
    for name, (path, engine, outcomes, facts) in found.items():
        result, score = record.variant(name), run.task.scores(outcomes)[run.task.metric_name]
        compared = {} if name == FLOAT else beside_dense(run.task, outcomes, dense)
        compared |= compared.get("on_reporting_half", {})
        rows.append(
            {
                "model": title,
                "form": name,
                "engine": engine,
                "score": score,
                **compared,
                "lost_points": -100 * compared.get("difference", 0.0),
                "speedup": result.speedup,
                "low": result.speedup_low,
                "high": result.speedup_high,
                "p50_ms": result.p50_ms,
                "onnx_bytes": path.stat().st_size,
                "n": len(result.samples_ms),
                "aa": [record.aa_ratio, record.aa_low, record.aa_high],
                **facts,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(CASES), default="banking77")
    parser.add_argument("--model", type=Path, required=True, help="dense classifier of the task")
    parser.add_argument("--members", type=Path, nargs="+", required=True, help="folders of members: dense, 3x …")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=200, help="of QAT")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=BenchmarkConfig().rounds)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/int8.json")
    options = parser.parse_args()
    rows, load_before = [], load_average()
    for member in options.members:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(member.name, member, options, Path(folder))
    figures = {}
    for row in rows:
        if row["form"] != FLOAT:
            name = f"{row['model']}_{row['form']}".replace(" ", "_").replace(",", "").replace("-", "_").lower()
            lost = (-100 * row["difference_high"], -100 * row["difference_low"])
            n, speedup = row["n_examples"], (row["low"], row["high"])
            figures[f"{name}_lost_points"] = Figure(row["lost_points"], "points", "report", n, interval=lost)
            figures[f"{name}_speedup"] = Figure(row["speedup"], "x", "report", row["n"], speedup, interval=speedup)
    packages = {name: importlib.metadata.version(name) for name in ("nncf", "optimum", "openvino")}
    settings = {"task": options.task, "packages": packages, "load_average_before": load_before, "steps": options.steps}
    write_result("int8", figures, rows, settings, options.output)


if __name__ == "__main__":
    main()
