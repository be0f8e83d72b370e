"""What huge pages do to latency, and to its spread between processes, on every engine that is installed.

Two processes with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` and two without take turns on one file; then the next four.
A speedup is over processes without. A spread is the standard deviation of the log ratio of two like processes, divided
by √2: what one process differs from another by, in percent, while the machine's drift cancels.

Figures ``worst_spread_with_percent``, ``worst_spread_without_percent`` and ``least_speedup`` over engines and shapes.
"""

from __future__ import annotations

import argparse
import contextlib
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


Place = tuple[bool, int]  # with huge pages or without; which of the two processes
PLACES: tuple[Place, ...] = tuple((huge, index) for huge in (False, True) for index in range(2))


def measure(file: TimedFile, environment: Environment, processes: int, rounds: int) -> dict[Place, list[float]]:
    """Milliseconds of every round (median of three runs) at every place, one set of processes after the other."""
    generator = np.random.default_rng(0)
    samples_ms: dict[Place, list[float]] = {place: [] for place in PLACES}
    for _ in range(processes):
        with contextlib.ExitStack() as stack:
            workers = {}
            for number in generator.permutation(len(PLACES)):
                huge, _ = PLACES[number]
                asked = environment.model_copy(update={"huge_pages": huge})
                worker = workers[PLACES[number]] = stack.enter_context(start_worker(file, asked))
                worker.load(MODEL, file.path)
                warm_up(worker)
            for _ in range(rounds):
                for number in generator.permutation(len(PLACES)):
                    ms = workers[PLACES[number]].time(MODEL, n=3, warmup_ms=TURN_WARMUP_MS)
                    samples_ms[PLACES[number]].append(float(np.median(ms)))
    return samples_ms


def spread_percent(first_ms: list[float], second_ms: list[float], processes: int) -> float:
    """What one process differs from another by: standard deviation in percent, from pairs in the same rounds."""
    logs = np.log(np.asarray(first_ms) / np.asarray(second_ms)).reshape(processes, -1)  # [processes, rounds]
    return 100 * float(np.median(logs, axis=1).std(ddof=1)) / float(np.sqrt(2))


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
    mean_ms = {huge: np.mean([samples_ms[huge, 0], samples_ms[huge, 1]], axis=0) for huge in (False, True)}
    ratio = process_ratio(mean_ms[False].tolist(), mean_ms[True].tolist(), where)
    spreads = {
        huge: spread_percent(samples_ms[huge, 0], samples_ms[huge, 1], options.processes) for huge in (False, True)
    }
    found = {
        "engine": engine,
        "shape": shape,
        "speedup": [ratio.value, ratio.low, ratio.high],
        "median_ms": {"without": float(np.median(mean_ms[False])), "with": float(np.median(mean_ms[True]))},
        "spread_without_percent": spreads[False],
        "spread_with_percent": spreads[True],
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
