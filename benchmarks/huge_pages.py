"""What huge pages do to latency, and to its spread between processes, on every engine that is installed.

Pairs of processes, one with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` and one without, take turns on one file; then the
next pair. A speedup is over processes without; a spread is the standard deviation of the logarithm of a process's
median, in percent. Where both share what the machine does to them, that of their ratio is less than of each.

Figures ``worst_spread_with_percent``, ``worst_spread_without_percent`` and ``least_speedup`` over engines and shapes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Figure, load_average, write_result
from shapes import SHAPES, dense_model, export

from ziplm_deploy.engines import TURN_WARMUP_MS, get_engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import MODEL, TimedFile, start_worker, warm_up
from ziplm_deploy.latency.statistics import process_ratio
from ziplm_deploy.machine.huge_pages import check_huge_pages
from ziplm_deploy.models.deployed import export_settings
from ziplm_deploy.recipe import Environment, ExportConfig, Workload

ENGINES = ("onnxruntime", "openvino", "deepsparse")


def measure(file: TimedFile, environment: Environment, processes: int, rounds: int) -> dict[bool, list[float]]:
    """Milliseconds of every round (median of three runs), with and without, one process after the other."""
    generator = np.random.default_rng(0)
    samples_ms: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(processes):
        asked = {huge: environment.model_copy(update={"huge_pages": huge}) for huge in samples_ms}
        with start_worker(file, asked[False]) as plain, start_worker(file, asked[True]) as huge:
            workers = {False: plain, True: huge}
            for worker in workers.values():
                worker.load(MODEL, file.path)
                warm_up(worker)
            for _ in range(rounds):
                for which in generator.permutation(2):
                    ms = workers[bool(which)].time(MODEL, n=3, warmup_ms=TURN_WARMUP_MS)
                    samples_ms[bool(which)].append(float(np.median(ms)))
    return samples_ms


def spread_percent(samples_ms: list[float], processes: int) -> float:
    """Standard deviation between processes of the logarithm of their medians, in percent."""
    medians = np.median(np.reshape(samples_ms, (processes, -1)), axis=1)
    return 100 * float(np.log(medians).std(ddof=1))


def row(engine: str, shape: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Figures of a shape on an engine; None where the engine is not installed."""
    try:
        get_engine(engine).version()
    except EngineError as missing:
        print(f"{engine}: {missing}")
        return None
    environment = Environment(engine=engine, workload=Workload(batch_size=1, seq_len=128))
    settings = export_settings(ExportConfig(shapes="static", opset=16), environment.workload)
    path = export(dense_model(SHAPES[shape]), folder / f"{shape}.onnx", settings)
    samples_ms = measure(TimedFile(path, engine), environment, options.processes, options.rounds)
    where = [index for index in range(options.processes) for _ in range(options.rounds)]
    ratio = process_ratio(samples_ms[False], samples_ms[True], where)
    found = {
        "engine": engine,
        "shape": shape,
        "speedup": [ratio.value, ratio.low, ratio.high],
        "median_ms": {str(huge): float(np.median(ms)) for huge, ms in samples_ms.items()},
        "spread_without_percent": spread_percent(samples_ms[False], options.processes),
        "spread_with_percent": spread_percent(samples_ms[True], options.processes),
        "load_average": load_average(),
    }
    print(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--shapes", nargs="+", default=["minilm-l6", "bert-base"], choices=sorted(SHAPES))
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10, help="of every process")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/huge_pages.json")
    options = parser.parse_args()
    check_huge_pages()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(engine, shape) for engine in options.engines for shape in options.shapes]
        rows = [found for pair in pairs if (found := row(*pair, Path(folder), options)) is not None]
    n = options.processes
    figures = {
        f"worst_spread_{which}_percent": Figure(max(row[f"spread_{which}_percent"] for row in rows), "%", "", n=n)
        for which in ("without", "with")
    }
    least = min((row["speedup"] for row in rows), key=lambda speedup: speedup[0])
    figures["least_speedup"] = Figure(least[0], "", "", n=n, spread=(least[1], least[2]))
    settings = {
        "processes": options.processes,
        "rounds": options.rounds,
        "environment": "batch 1, 128 tokens, 1 thread",
    }
    write_result("huge_pages", figures, rows, settings, options.output)


if __name__ == "__main__":
    main()
