"""How often a benchmark's "95 %" intervals hold the truth: by simulation, and by real models beside themselves.

Simulated: whole benchmarks of the shipped defaults, whose processes take more rounds while these are unsure, and which
end when intervals are narrow or after the largest number of processes, with 1 to 3 % between processes and 1 % between
rounds. Real: one file under several names, so that every speedup is truly 1.

Figures ``simulated_coverage_percent`` (the one farthest from 95) and ``real_aa_coverage_percent``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Figure, load_average, write_result
from scipy.stats import binomtest

from ziplm_deploy.latency.benchmark import AA, MOST_ROUNDS, SURE, compare, is_unsure, precise_within
from ziplm_deploy.latency.statistics import Ratio, process_ratio
from ziplm_deploy.recipe import BenchmarkConfig, Environment, Workload

TARGET = 2.0
N_RESAMPLES = 10_000  # of the real benchmarks
WITHIN_PROCESS = 0.01  # standard deviation of rounds, as a fraction
SPREADS = (0.01, 0.015, 0.02, 0.03)  # between processes
SPEEDUPS = (0.98 * TARGET, TARGET, 1.005 * TARGET)  # at the edge of the tolerance, at the target, where loops aim


def simulated_intervals(spread: float, truth: float, n: int, seed: int = 0) -> Iterator[tuple[Ratio, int]]:
    """Speedup of a file that is ``truth`` times as fast in ``n`` simulated benchmarks, and the processes they took."""
    settings, generator = BenchmarkConfig(), np.random.default_rng(seed)
    decided = precise_within(settings.tolerance)
    latencies = {"baseline": 20.0, AA: 20.0, "file": 20.0 / truth}
    for _ in range(n):
        seen: dict[str, list[float]] = {name: [] for name in latencies}
        where: list[int] = []
        for processes in range(1, settings.max_processes + 1):
            rounds = _simulated_process(generator, spread, latencies, settings)
            for name, samples in rounds.items():
                seen[name] += samples
            where += [processes] * len(rounds["file"])
            if processes < settings.processes:
                continue
            speedup = process_ratio([seen["baseline"], seen[AA]], seen["file"], where)
            if decided({"file": speedup, AA: process_ratio(seen["baseline"], seen[AA], where)}):
                break
        yield speedup, processes


def _simulated_process(
    generator: np.random.Generator, spread: float, latencies: Mapping[str, float], settings: BenchmarkConfig
) -> dict[str, list[float]]:
    """Milliseconds of the rounds of one process of each file: its share, and more while they are unsure."""
    share = settings.rounds // settings.processes
    samples = {
        name: latency * np.exp(generator.normal(0, spread) + generator.normal(0, WITHIN_PROCESS, MOST_ROUNDS * share))
        for name, latency in latencies.items()
    }
    others = [name for name in latencies if name != "baseline"]
    done = share
    while done < MOST_ROUNDS * share and is_unsure(
        {name: values[:done, None] for name, values in samples.items()},  # type: ignore[misc]
        "baseline",
        others,
        SURE * settings.tolerance,
    ):
        done += 1
    return {name: values[:done].tolist() for name, values in samples.items()}


def simulated_row(spread: float, truth: float, n: int) -> dict[str, Any]:
    """Coverage, mean processes and median half width of one kind of simulated benchmark."""
    found = list(simulated_intervals(spread, truth, n, seed=int(1000 * spread + 100 * truth)))
    held = sum(speedup.low <= truth <= speedup.high for speedup, _ in found)
    return {
        "kind": "simulated",
        "spread_percent": 100 * spread,
        "truth": truth,
        "coverage_percent": 100 * held / n,
        "processes": float(np.mean([processes for _, processes in found])),
        "half_width_percent": 100 * float(np.median([speedup.half_width for speedup, _ in found])),
        "n": n,
    }


def real_row(path: Path, environment: Environment, copies: int, seed: int) -> dict[str, Any]:
    """One benchmark of a file under several names: intervals of ratios that are truly 1."""
    files = {name: path for name in ("baseline", *(f"copy {index}" for index in range(copies)))}
    record = compare(files, environment, BenchmarkConfig(), "baseline", seed=seed)
    ratios = [record.itself, *(timing.ratio for timing in record.variants if timing.name != "baseline")]
    return {
        "kind": "real",
        "intervals": [[ratio.value, ratio.low, ratio.high] for ratio in ratios],
        "held": [ratio.low <= 1.0 <= ratio.high for ratio in ratios],
        "processes": len(record.rounds_of_processes),
        "seconds": record.seconds,
        "load_average": load_average(),
    }


def figures_of(simulated: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Coverage of the kind of simulation farthest from 95 %, with its binomial interval, and of real models.

    Ratios of one real benchmark share the baseline's processes: their interval is over benchmarks (bootstrap).
    """
    farthest = max(simulated, key=lambda row: abs(row["coverage_percent"] - 95))
    n_held = round(farthest["coverage_percent"] * farthest["n"] / 100)
    simulation = binomtest(n_held, farthest["n"]).proportion_ci()
    interval = 100 * float(simulation.low), 100 * float(simulation.high)
    held = 100 * np.array([row["held"] for row in real], dtype=float)  # [benchmarks, ratios]
    drawn = np.random.default_rng(0).integers(0, len(held), (N_RESAMPLES, len(held)))
    low, high = np.quantile(held[drawn].mean((1, 2)), (0.025, 0.975))
    return {
        "simulated_coverage_percent": Figure(
            farthest["coverage_percent"], "%", "93 to 97", farthest["n"], interval=interval
        ),
        "real_aa_coverage_percent": Figure(
            float(held.mean()), "%", ">= 90", len(held), interval=(float(low), float(high))
        ),
    }


def main() -> None:
    from shapes import SHAPES, dense_model, export

    from ziplm_deploy.models.deployed import export_settings
    from ziplm_deploy.recipe import ExportConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000, help="simulated benchmarks of every kind")
    parser.add_argument("--repeats", type=int, default=20, help="real benchmarks")
    parser.add_argument("--copies", type=int, default=2, help="files beside the baseline, all the same")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="minilm-l6")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/coverage.json")
    options = parser.parse_args()
    environment = Environment(huge_pages=options.huge_pages, workload=Workload(batch_size=1, seq_len=128))
    simulated = [simulated_row(spread, truth, options.trials) for spread in SPREADS for truth in SPEEDUPS]
    load_before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        settings = export_settings(ExportConfig(), environment.workload)
        path = export(dense_model(SHAPES[options.shape]), Path(folder) / "model.onnx", settings)
        real = []
        for seed in range(options.repeats):
            real.append(real_row(path, environment, options.copies, seed))
            print(f"{seed}: {real[-1]['processes']} processes, {real[-1]['held']}", file=sys.stderr)
    settings_shown = {
        "benchmark": BenchmarkConfig().model_dump(mode="json"),
        "environment": environment.describe(),
        "shape": options.shape,
        "load_average_before": load_before,
    }
    write_result("coverage", figures_of(simulated, real), [*simulated, *real], settings_shown, options.output)


if __name__ == "__main__":
    main()
