"""One timing loop for all engines: a process a model, interleaved, the baseline against itself beside it.

Works with any ONNX file: inputs are made from the names, types and shapes that the session declares.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ziplm_deploy.artifacts import BenchmarkRecord, VariantResult
from ziplm_deploy.config import BenchmarkConfig, Environment
from ziplm_deploy.engines import WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.errors import UsageError
from ziplm_deploy.machine import machine_info
from ziplm_deploy.statistics import is_stable, median_ratio, relative_standard_error, summarize

Progress = Callable[[int, int], None]  # (rounds done, rounds at most)
AA = "baseline again"
MODEL = "model"
WARMUP_RUNS = 24
WARMUP_SECONDS = 10.0
EARLY_STOP_ERROR = 0.002  # standard error of every ratio's median: more rounds would not change a decision


def compare(
    models: Mapping[str, Path],
    environment: Environment,
    config: BenchmarkConfig,
    baseline: str,
    progress: Progress | None = None,
    *,
    shapes: str = "dynamic",
    seed: int = 0,
) -> BenchmarkRecord:
    """Time ``models`` (name → ONNX file) against ``baseline``, one of their names.

    Every model runs in a worker process of its own; a second process of the baseline gives the A/A line. In each round
    the workers take turns in random order: one untimed run, then ``runs_per_round`` timed ones. Speedup is the median
    over rounds of the ratio within a round; the baseline's side of it is the mean of its two processes, because where a
    process lies in memory shifts its latency a little. ``shapes`` says how the files were exported, which decides the
    graph optimisations that are left out.

    Raises:
        UsageError: no models, or ``baseline`` is none of them.
        EnvironmentMismatchError: more threads than granted.
        EngineError: a model is rejected or its worker dies or hangs; names the model and how to reproduce it.
    """
    if baseline not in models:
        raise UsageError(f"expected the baseline to be one of {', '.join(models) or '(no models)'}, found {baseline!r}")
    started = time.monotonic()
    engine = get_engine(environment.engine)
    options = WorkerOptions(
        threads=environment.threads,
        batch_size=environment.batch_size,
        seq_len=environment.seq_len,
        disabled_optimizers=engine.disabled_optimizers(shapes),
    )
    with contextlib.ExitStack() as stack:
        workers: dict[str, WorkerHandle] = {}
        for name, path in [*models.items(), (AA, models[baseline])]:
            worker = stack.enter_context(engine.start_worker(options))
            worker.load(MODEL, Path(path))
            workers[name] = worker
        for worker in workers.values():
            warm_up(worker)
        rounds = _interleave(workers, baseline, config, progress, seed)
        peaks = {name: worker.peak_memory_bytes() for name, worker in workers.items()}
    aa_ratio, aa_low, aa_high = median_ratio(_per_round(rounds[baseline]), _per_round(rounds[AA]))
    return BenchmarkRecord(
        machine=machine_info(),
        engine=engine.name,
        engine_version=engine.version(),
        environment=environment,
        baseline=baseline,
        aa_ratio=aa_ratio,
        aa_low=aa_low,
        aa_high=aa_high,
        variants=[
            _result(name, Path(path), rounds, baseline, environment.batch_size, peaks[name])
            for name, path in models.items()
        ],
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


def warm_up(worker: WorkerHandle, model_id: str = MODEL) -> list[float]:
    """Run until the last windows of timings agree, within limits; returns the milliseconds seen."""
    samples_ms: list[float] = []
    started = time.monotonic()
    while not is_stable(samples_ms) and len(samples_ms) < WARMUP_RUNS and time.monotonic() - started < WARMUP_SECONDS:
        samples_ms += worker.time(model_id, n=3, warmup=0)
    return samples_ms


def _interleave(
    workers: Mapping[str, WorkerHandle], baseline: str, config: BenchmarkConfig, progress: Progress | None, seed: int
) -> dict[str, list[list[float]]]:
    """Timed milliseconds, name → round → run."""
    generator = np.random.default_rng(seed)
    names = list(workers)
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    started = time.monotonic()
    for done in range(1, config.rounds + 1):
        for index in generator.permutation(len(names)):
            name = names[index]
            rounds[name].append(workers[name].time(MODEL, n=config.runs_per_round, warmup=1))
        if progress is not None:
            progress(done, config.rounds)
        if time.monotonic() - started > config.max_seconds and done >= 3:
            break
        if done >= config.rounds // 2 and _settled(rounds, baseline):
            break
    return rounds


def _settled(rounds: Mapping[str, list[list[float]]], baseline: str) -> bool:
    base_ms = np.asarray(_reference(rounds, baseline))
    ratios = (base_ms / np.asarray(_per_round(rounds[name])) for name in rounds)
    return all(relative_standard_error(ratio) < EARLY_STOP_ERROR for ratio in ratios)


def _reference(rounds: Mapping[str, list[list[float]]], baseline: str) -> list[float]:
    """Baseline milliseconds a round: mean of its two processes."""
    pairs = zip(_per_round(rounds[baseline]), _per_round(rounds[AA]), strict=True)
    return [(first + second) / 2 for first, second in pairs]


def _per_round(samples_ms: list[list[float]]) -> list[float]:
    return [float(np.median(round_ms)) for round_ms in samples_ms]


def _result(
    name: str, path: Path, rounds: Mapping[str, list[list[float]]], baseline: str, batch_size: int, peak: int
) -> VariantResult:
    samples_ms = [sample for round_ms in rounds[name] for sample in round_ms]
    timing = summarize(samples_ms)
    own_ms = _per_round(rounds[name])
    reference_ms = own_ms if name == baseline else _reference(rounds, baseline)  # a baseline's own speedup is 1
    speedup, low, high = median_ratio(reference_ms, own_ms)
    return VariantResult(
        name=name,
        path=str(path),
        latency=timing,
        p50_ms=timing.median_ms,
        throughput_per_second=1000.0 * batch_size / timing.median_ms,
        peak_memory_bytes=peak,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        samples_ms=samples_ms,
    )
