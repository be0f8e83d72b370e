"""What a table in the deployed form buys: the same compound target, searched with it, or with the float32 table.

``python benchmarks/compound_tables.py --model CHECKPOINT --data FOLDER`` asks for ``--targets`` over dense float32 ONNX
Runtime, reached by 80 % zeros and INT8 on DeepSparse. *Deployed form*: the recipe says so (``compress.target``).
*Float32*: as one would do it without: measure what zeros and INT8 bring to the dense model, divide the target by it,
prune to that with the float32 table (of the same engine) and compress afterwards. Both get the same calibration data,
no training. Figures: how far each lands from the target, and its accuracy.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from common import ROOT, Figure, load_average, write_result
from family import CASES

from ziplm_deploy.api import profile, run_recipe
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.reporting.records import FamilyReport

TARGETS = (6.0, 8.0, 10.0)
FORM, FLOAT = "deployed form", "float32"


def recipe_of(name: str, target: str, speedups: list[float], options: argparse.Namespace) -> Recipe:
    case, data = CASES["sst2"], options.data.resolve() / CASES["sst2"].folder
    return parse_recipe(
        {
            "name": name,
            "output_dir": str(options.work),
            "model": {"path": str(options.model), "task": case.task},
            "data": {
                "calibration": str(data / "train.jsonl.gz"),
                "evaluation": str(data / "validation.jsonl.gz"),
            },
            "environment": {"engine": "deepsparse"},
            "speedups": speedups,
            "export": {"shapes": "static", "opset": 16},
            "benchmark": {"baseline_engine": "onnxruntime"},
            "compress": {"variants": ["sparse-int8"], "target": target, "int8": {"method": "static", "max_loss": 0.99}},
        }
    )


def rows_of(table: str, targets: list[float], report: FamilyReport) -> list[dict[str, Any]]:
    """One row a target: what its sparse INT8 file reached."""
    rows = []
    for target, member in zip(targets, report.members[1:], strict=True):
        file = next(file for file in member.files if file.variant == "sparse-int8")
        rows.append(
            {
                "table": table,
                "target": target,
                "pruned_for": member.speedup_target,
                "predicted_speedup": member.predicted_speedup,
                "measured_speedup": file.measured_speedup,
                "low": file.measured_low,
                "high": file.measured_high,
                "error_percent": 100 * (file.measured_speedup / target - 1),
                "corrections": member.corrections,
                "score": file.accuracy[report.metric],
                "dense_score": report.members[0].served.accuracy[report.metric],
                "sizes": list(member.sizes.values()),
            }
        )
    return rows


def unpruned_share(table: LatencyTable) -> float:
    """Latency of the dense model in the table's form, as a share of the dense float32 model on ONNX Runtime."""
    assert table.unpruned is not None
    return table.unpruned.median_ms / table.dense.median_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense SST-2 classifier")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compound_tables")
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/compound_tables.json")
    options = parser.parse_args()
    targets, load_before = sorted(options.targets), load_average()
    float_share = unpruned_share(profile(recipe_of("float32", "fp32", targets[:1], options), ConsoleProgress()))
    with_form = run_recipe(recipe_of("deployed-form", "sparse-int8", targets, options), ConsoleProgress())
    factor = float_share / unpruned_share(LatencyTable.load(options.work / "deployed-form" / "profile.json"))
    float_targets = [target / factor for target in targets]
    without = run_recipe(
        recipe_of("float32", "fp32", [max(1.01, t) for t in float_targets], options), ConsoleProgress()
    )
    rows = rows_of(FORM, targets, with_form) + rows_of(FLOAT, targets, without)
    figures = {}
    for name, key in ((FORM, "deployed_form"), (FLOAT, "float32")):
        own = [row for row in rows if row["table"] == name]
        worst = max(own, key=lambda row: abs(row["error_percent"]))
        spread = (min(row["error_percent"] for row in own), max(row["error_percent"] for row in own))
        figures[f"{key}_worst_target_error_percent"] = Figure(
            abs(worst["error_percent"]), "%", "report", len(own), spread
        )
        for row in own:
            figures[f"{key}_score_{row['target']:g}x"] = Figure(row["score"], "", "report", 1)
    settings = {"task": "sst2", "factor_of_zeros_and_int8": factor, "load_average_before": load_before}
    write_result("compound_tables", figures, rows, settings, options.output)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
