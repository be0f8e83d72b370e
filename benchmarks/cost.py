"""What a five-member family costs in one gradual run, against pruning and training five models one by one.

``python benchmarks/cost.py --data FOLDER`` runs the command line in processes of their own, all-MiniLM-L6-v2 on STS-B,
the same steps for every member. Figures: ``family_cost_ratio``, wall time of the family over the sum of the five;
``family_peak_bytes`` and ``separate_peak_bytes``, the highest resident memory; and how many examples a second recovery
trains, beside a plain Trainer fine-tuning the dense model on the same sentences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from common import ROOT, Figure, grouped_by_length, load_average, write_result
from family import MODEL, TARGETS, recipe_of

from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.recovery.training import training_arguments
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run


def measured_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Run a recipe by the command line; wall seconds, peak memory and what its report says."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ziplm_deploy", "run", str(path), "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if os.waitstatus_to_exitcode(status) not in (0, 3, 4):  # a target was missed, or is undecided
        sys.exit(f"expected {path} to run, found exit status {os.waitstatus_to_exitcode(status)}")
    report = FamilyReport.load(recipe.run_dir / "report.json")
    return {
        "name": recipe.name,
        "targets": list(recipe.speedups),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "scores": [member.served.accuracy.get(report.metric) for member in report.members],
        "samples_per_second": [m.training.samples_per_second for m in report.members if m.training is not None],
        "stage_seconds": report.stage_seconds,
    }


def plain_fine_tuning(recipe: Recipe, steps: int) -> float:
    """Examples a second of a stock Trainer on the dense model, with a two-class head and invented labels."""
    run = Run(recipe)
    path = resolve_model_path(recipe.model.path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    examples = run.data.examples
    rows = [
        {name: examples[i][name][0] for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor(i % 2)}
        for i in range(len(examples))
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = recipe.recover.model_copy(update={"max_steps": steps, "save_steps": 10**6})
        arguments = training_arguments(config, Path(folder), 0)
        for name, value in grouped_by_length().items():
            setattr(arguments, name, value)
        collator = transformers.DataCollatorWithPadding(run.dense.processor)
        trainer = transformers.Trainer(model, arguments, data_collator=collator, train_dataset=rows)
        outcome = trainer.train()
    return float(outcome.metrics["train_samples_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps a member")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/cost.json")
    options = parser.parse_args()
    options.targets, options.table, options.model = list(TARGETS), None, None
    load = load_average()
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        raw = recipe_of("stsb", options).model_dump(mode="json")
        family = measured_run(parse_recipe(raw | {"name": "family"}), options.work)
        separate = []
        for target in TARGETS:
            alone = raw | {"name": f"only-{target:g}x", "speedups": [target]}
            separate.append(measured_run(parse_recipe(alone), options.work))
        plain = plain_fine_tuning(parse_recipe(raw), min(options.steps, 100))
    whole = sum(run["seconds"] for run in separate)
    computed = sum(run["cpu_seconds"] for run in separate)
    rates = family["samples_per_second"]
    figures = {
        "family_cost_ratio": Figure(family["seconds"] / whole, "", "<= 1", 1),
        "family_cpu_ratio": Figure(family["cpu_seconds"] / computed, "", "report", 1),
        "family_seconds": Figure(family["seconds"], "s", "report", 1),
        "separate_seconds": Figure(whole, "s", "report", len(separate)),
        "family_peak_bytes": Figure(family["peak_bytes"], "bytes", "report", 1),
        "separate_peak_bytes": Figure(max(run["peak_bytes"] for run in separate), "bytes", "report", len(separate)),
        "recovery_samples_per_second": Figure(rates[0], "1/s", "report", len(rates), (min(rates), max(rates))),
        "plain_trainer_samples_per_second": Figure(plain, "1/s", "report", 1),
    }
    settings = {"model": MODEL, "task": "stsb", "targets": TARGETS, "steps": options.steps, "load_average_before": load}
    settings |= {"recover": raw["recover"]}
    write_result("cost", figures, [family, *separate], settings, options.output)


if __name__ == "__main__":
    main()
