"""What zeros cost: 60, 80 and 90 % of a fine-tuned MiniLM, in one pass or several, as zeroed or trained after it.

``python benchmarks/sparsity_accuracy.py --model CHECKPOINT --data FOLDER`` zeroes the dense SST-2 classifier (or
``--member FOLDER``, a pruned one) and scores the ONNX files. With several passes the Hessians are collected anew before
each. Figures: ``percent_of_dense_80`` and so on, the best of each sparsity, chosen by one half of the sentences
and reported on the other; rows: all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from accuracy import beside_dense, percent_figure
from common import ROOT, load_average, write_result
from family import CASES, TOWARDS_LOGITS, training_file
from torch import nn

from ziplm_deploy.compression.sparsity.masks import check_masks_in_onnx, zero_masks, zeros_held
from ziplm_deploy.compression.sparsity.sparsify import sparsify_model
from ziplm_deploy.models.member_files import load
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import Recipe, SparsityConfig, Variant, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.evaluate import outcomes_on
from ziplm_deploy.stages.export import export_checked, export_dense
from ziplm_deploy.stages.recover import distillation
from ziplm_deploy.tasks.outcomes import Outcomes

SPARSITIES = (0.6, 0.8, 0.9)
PASSES = (1, 8)


def recipe_of(options: argparse.Namespace, folder: Path) -> Recipe:
    case, data = CASES["sst2"], options.data.resolve() / CASES["sst2"].folder
    losses = {key: value for key, value in TOWARDS_LOGITS.items() if key != "learning_rate"}
    training = {"max_steps": options.steps, "learning_rate": options.learning_rate, "precision": options.precision}
    return parse_recipe(
        {
            "name": "sparsity",
            "output_dir": str(folder),
            "model": {"path": str(options.model), "task": case.task},
            "data": {
                "calibration": str(data / "train.jsonl.gz"),
                "evaluation": str(data / "validation.jsonl.gz"),
                "train": training_file("sst2", data / "train.jsonl.gz", folder),
            },
            "speedups": [2],
            "recover": losses,
            "compress": {"variants": ["sparse"], "train": {"mode": "distil", **training}},
        }
    )


def measure(
    run: Run, config: SparsityConfig, dense: Outcomes, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Scores of one sparsity, as zeroed and trained."""
    model = load(options.member or run.dense_member.folder)
    record = sparsify_model(model, run.data.calibration.hessian, config, memory_limit_bytes=2**33)
    facts = {
        "sparsity": record.sparsity,
        "pattern": config.pattern,
        "passes": config.passes,
        "worst_relative_error": max(linear.relative_error for linear in record.linears),
    }
    rows = [{**facts, "trained_steps": 0, **score(run, model, dense, folder)}]
    if config.passes in options.train_passes:
        # A folder of its own: training would go on from the last checkpoint that it finds there.
        checkpoints = folder / "checkpoints" / f"{config.sparsity:g}-{config.passes}"
        with zeros_held(model, zero_masks(model)):
            training = distillation(run).train(model, run.recipe.compress.train, checkpoints, "sparse")
        rows.append({**facts, "trained_steps": training.steps, **score(run, model, dense, folder)})
    print(json.dumps(rows), flush=True)
    return rows


def score(run: Run, model: nn.Module, dense: Outcomes, folder: Path) -> dict[str, Any]:
    """Score of a model's file, beside the dense one's on the same sentences."""
    path = folder / "model.onnx"
    export_checked(run, model, path, "sparse")
    check_masks_in_onnx(path, model)
    outcomes = outcomes_on(run, path, Variant.SPARSE)
    return {"score": run.task.scores(outcomes)[run.task.metric_name], **beside_dense(run.task, outcomes, dense)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense SST-2 classifier")
    parser.add_argument("--member", type=Path, help="folder of a pruned member to zero instead of the dense model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--train-passes", type=int, nargs="*", default=[1, 8], help="numbers of passes to train after")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/sparsity_accuracy.json")
    options = parser.parse_args()
    rows, load_before = [], load_average()
    with tempfile.TemporaryDirectory() as name:
        run = Run(recipe_of(options, Path(name)), ConsoleProgress())
        export_dense(run)
        dense = outcomes_on(run, run.dense_member.file(Variant.FP32).path, Variant.FP32)
        for sparsity in SPARSITIES:
            for passes in PASSES:
                config = SparsityConfig(sparsity=sparsity, passes=passes)
                rows += measure(run, config, dense, options, Path(name) / "sparse")
    figures = {}
    for sparsity in SPARSITIES:
        own = [row for row in rows if abs(row["sparsity"] - sparsity) < 0.01]
        for title, chosen in (
            ("one_shot", [row for row in own if not row["trained_steps"]]),
            ("trained", [row for row in own if row["trained_steps"]]),
        ):
            if chosen:
                best = max(chosen, key=lambda row: row["percent_on_choosing_half"])["on_reporting_half"]
                figure = percent_figure(best, "report", best["n_examples"])
                figures[f"percent_of_dense_{100 * sparsity:.0f}_{title}"] = figure
    settings = {
        "task": "sst2",
        "dense_score": run.task.scores(dense)[run.task.metric_name],
        "calibration": run.recipe.data.n_calibration,
        "train": run.recipe.compress.train.model_dump(mode="json"),
        "load_average_before": load_before,
    }
    write_result("sparsity_accuracy", figures, rows, settings, options.output)


if __name__ == "__main__":
    main()
