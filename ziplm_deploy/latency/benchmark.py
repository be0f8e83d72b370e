"""One timing loop for all engines: models in processes of their own, interleaved, the baseline beside itself.

Works with any ONNX file: inputs are made from the names, types and shapes that the session declares. Every file may run
on an engine of its own, so that a compressed model where it will serve stands beside the dense one where it serves now.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ziplm_deploy.engines import TURN_WARMUP_MS, WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.errors import UsageError
from ziplm_deploy.latency.record import BenchmarkRecord, CallTiming, FileTiming
from ziplm_deploy.latency.statistics import Ratio, Timing, is_stable, process_ratio, relative_standard_error, summarize
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.machine.locks import timing_alone
from ziplm_deploy.progress import Note, StepProgress
from ziplm_deploy.recipe import BenchmarkConfig, EngineName, Environment, Workload

AA = "baseline again"
MODEL = "model"
WARMUP_RUNS = 24
WARMUP_SECONDS = 10.0
FILES_WITHIN_LIMIT = 10  # max_seconds is for so many
MIN_ROUNDS = 3  # of a process, however slow
MOST_ROUNDS = 3  # times its share, while what a process says is unsure
SURE = 0.25  # of the tolerance: standard error of a process' ratio
STEERING_PROCESSES = 3  # after which a measurement may end that steers a run and is not reported
# Whether ratios so far (name of a file -> its speedup; AA -> the baseline over itself) are sure enough to end it.
Decided = Callable[[Mapping[str, Ratio]], bool]
_Round = list[float]  # milliseconds of its runs
_Rounds = dict[str, list[_Round]]  # of every file by its name


@dataclass(frozen=True)
class TimedFile:
    """One ONNX file in a benchmark, the engine that runs it (None: that of the environment), and what it may take."""

    path: Path
    engine: EngineName | None = None
    memory_limit_bytes: int | None = None  # address space of its worker; None: as much as it takes
    plain_pages: bool = False  # no huge pages, also where the environment asks for them


@dataclass(frozen=True)
class _Facts:
    """Fields of a :class:`FileTiming` that its timings do not tell."""

    path: str
    engine: str
    engine_version: str
    peak_memory_bytes: int  # the largest of its processes
    huge_page_bytes: int | None  # of the last of its processes


@dataclass
class _Timings:
    """What all processes of a benchmark gave."""

    rounds: _Rounds
    baseline: str
    processes: list[int] = field(default_factory=list)  # of each round of the baseline; other files may have fewer
    facts: dict[str, _Facts] = field(default_factory=dict)  # of each file
    of_calls: dict[str, list[list[_Round]]] = field(default_factory=dict)  # rounds of each file on each call

    def peak_memory_bytes(self, name: str) -> int:
        """The largest of a file's processes so far."""
        return self.facts[name].peak_memory_bytes if name in self.facts else 0

    def ratio(self, name: str, call: int | None = None) -> Ratio:
        """Speedup of a file, on one call if that is given; of the baseline, that of one of its processes over the
        other."""
        own = self.per_round(name, call)
        if name == self.baseline:
            return process_ratio(own, self.per_round(AA, call), self.processes)
        baselines = [self.per_round(each, call)[: len(own)] for each in (self.baseline, AA)]
        return process_ratio(baselines, own, self.processes[: len(own)])

    def per_round(self, name: str, call: int | None = None) -> list[float]:
        """Median milliseconds of every round, of the workload or of one of its calls."""
        return [float(np.median(round_ms)) for round_ms in self.rounds_of(name, call)]

    def rounds_of(self, name: str, call: int | None) -> list[_Round]:
        """Milliseconds of every round, of the workload or of one of its calls."""
        return self.rounds[name] if call is None else self.of_calls[name][call]

    def add(self, rounds: _Rounds, workers: Mapping[str, FileWorker], process: int) -> None:
        """Append the rounds of one part, and what its workers kept of the calls."""
        for name, round_ms in rounds.items():
            self.rounds[name] += round_ms
            kept = self.of_calls.setdefault(name, [[] for _ in workers[name].calls])
            for own, more in zip(kept, workers[name].calls, strict=True):
                own += more
        self.processes += [process] * (len(self.rounds[AA]) - len(self.processes))


class FileWorker:
    """A file's worker on every call of a workload: its milliseconds are their weighted sum, and each call's are kept.

    The calls of a run follow one another, each after untimed runs of its own.
    """

    def __init__(self, worker: WorkerHandle, weights: Sequence[float]) -> None:
        self.worker, self._weights = worker, np.asarray(weights)
        self.calls: list[list[_Round]] = [[] for _ in weights]

    def time(self, model_id: str, n: int, warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        """Expected milliseconds of ``n`` runs of every call; see :meth:`WorkerHandle.time`."""
        for call, rounds in enumerate(self.calls):
            rounds.append(self.worker.time(model_id, n=n, warmup=warmup, warmup_ms=warmup_ms, call=call))
        expected: list[float] = (self._weights @ [rounds[-1] for rounds in self.calls]).tolist()  # [calls, n] -> [n]
        return expected


def precise_within(tolerance: float) -> Decided:
    """Sure enough when every interval, and the noise floor, reaches at most ``tolerance`` (a fraction) to a side."""
    return lambda ratios: all(ratio.half_width <= tolerance for ratio in ratios.values()) and quiet(ratios, tolerance)


def quiet(ratios: Mapping[str, Ratio], tolerance: float) -> bool:
    """Whether the noise floor, of the baseline against itself, lies within the tolerance."""
    return ratios[AA].floor <= tolerance


def compare(
    files: Mapping[str, TimedFile | Path],
    environment: Environment,
    config: BenchmarkConfig,
    baseline: str,
    progress: StepProgress | None = None,
    *,
    seed: int = 0,
    decided: Decided | None = None,
    earliest: int | None = None,
    aside: Collection[str] = (),
    note: Note | None = None,
) -> BenchmarkRecord:
    """Time ``files`` (name → :class:`TimedFile`, or just an ONNX file) against ``baseline``, one of their names.

    Every model runs in a worker process of its own; a second process of the baseline gives the A/A line. After a share
    of the rounds all of them end, and new ones begin, ``config.processes`` times: what a process makes of a file, where
    it lies in memory above all, shifts its latency by 1 to 3 %, and sometimes by much more. In each round the workers
    take turns in random order: 10 ms of untimed runs (one at least), then ``runs_per_round`` timed ones. A process
    takes up to three times its share of rounds while noise within it leaves a ratio unsure: a round costs less than
    another process, and is all that helps where a disturbed machine is what differs. Speedup is
    the mean of those over the baseline's two processes, with its interval as of :func:`process_ratio`. While
    ``decided`` is not satisfied, more processes follow, up to ``config.max_processes`` or the time limit; default:
    every interval within the tolerance. It is asked after ``earliest`` processes, by default all of
    ``config.processes``. Files ``aside`` take no part in that: they have the first ``config.processes`` only.
    Threads, batch size and tokens are those of ``environment`` on every engine. Of a workload with several calls a
    worker runs each of them in its turn; speedup is that of their weighted sum, the expected latency. Another
    measurement on this machine is waited for; ``note`` is told so.

    Raises:
        UsageError: no models, or ``baseline`` is none of them.
        EnvironmentMismatchError: more threads than granted.
        EngineError: an engine is missing, a model is rejected or its worker dies or hangs; names the model and how to
            reproduce it. Nothing is returned then: a record without one of its models would look complete.
    """
    if baseline not in files:
        known = ", ".join(files) or "(no models)"
        raise UsageError(f"expected the baseline to be one of {known}, found {baseline!r}; name one")
    started = time.monotonic()
    entries = {name: entry if isinstance(entry, TimedFile) else TimedFile(entry) for name, entry in files.items()}
    engine_version = get_engine(environment.engine).version()
    decided = decided or precise_within(config.tolerance)
    earliest = min(earliest or config.processes, config.processes)
    with timing_alone(note):
        timed = _time_files(entries, environment, config, baseline, progress, seed, decided, earliest, aside)
    itself = timed.ratio(baseline)
    return BenchmarkRecord(
        machine=machine_info(),
        engine=environment.engine,
        engine_version=engine_version,
        environment=environment,
        baseline=baseline,
        aa_ratio=itself.value,
        aa_low=itself.low,
        aa_high=itself.high,
        tolerance=config.tolerance,
        rounds_of_processes=[timed.processes.count(index) for index in range(max(timed.processes) + 1)],
        variants=[_result(timed, name, environment.workload) for name in entries],
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


def _time_files(
    entries: Mapping[str, TimedFile],
    environment: Environment,
    config: BenchmarkConfig,
    baseline: str,
    progress: StepProgress | None,
    seed: int,
    decided: Decided,
    earliest: int,
    aside: Collection[str],
) -> _Timings:
    """Rounds of every part of a benchmark, each part with new processes."""
    timed = _Timings({name: [] for name in [*entries, AA]}, baseline)
    part, started, limit_s = _part(config), time.monotonic(), _time_limit_s(config, len(entries))
    for index in range(max(config.processes, config.max_processes)):
        if index == config.processes:
            entries = {name: entry for name, entry in entries.items() if name not in aside}
        if index >= earliest and (time.monotonic() - started > limit_s or decided(_ratios(timed, entries))):
            break
        report = _shifted(progress, index * part.rounds, max(config.processes, index + 1) * part.rounds)
        with _workers(entries, environment, baseline, seed + index) as workers:
            judged = {AA, *entries} - {baseline, *aside}
            unsure = partial(is_unsure, baseline=baseline, judged=judged, error=SURE * config.tolerance)
            timed.add(_interleave(workers, part, report, seed + index, unsure), workers, index)
            for name, entry in entries.items():
                worker = workers[name].worker
                timed.facts[name] = _Facts(
                    str(entry.path),
                    entry.engine or environment.engine,
                    worker.version,
                    max(timed.peak_memory_bytes(name), worker.peak_memory_bytes()),
                    worker.huge_page_bytes(),
                )
    return timed


def _ratios(timed: _Timings, names: Iterable[str]) -> dict[str, Ratio]:
    others = {name: timed.ratio(name) for name in names if name != timed.baseline}
    return {AA: timed.ratio(timed.baseline), **others}


@contextlib.contextmanager
def _workers(
    entries: Mapping[str, TimedFile], environment: Environment, baseline: str, seed: int
) -> Iterator[dict[str, FileWorker]]:
    """A warm worker for every file, and one for the baseline again.

    They come up together and load in random order: a place in it shifts a latency, by 1.5 % from the first to the last
    of six.
    """
    files = {**entries, AA: entries[baseline]}
    names = [list(files)[index] for index in np.random.default_rng(seed).permutation(len(files))]
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(start_worker(files[name], environment, wait=False)) for name in names}
        for name, worker in workers.items():
            worker.load(MODEL, Path(files[name].path))
        weights = environment.workload.weights
        for worker in workers.values():
            for call in range(len(weights)):
                warm_up(worker, call=call)
        yield {name: FileWorker(worker, weights) for name, worker in workers.items()}


def _part(config: BenchmarkConfig) -> BenchmarkConfig:
    """The share of one of the first processes in rounds and seconds."""
    rounds = -(-config.rounds // config.processes)
    return config.model_copy(update={"rounds": rounds, "max_seconds": config.max_seconds / config.processes})


def _shifted(progress: StepProgress | None, n_before: int, total: int) -> StepProgress | None:
    """Progress of all parts, told by that of one."""
    return None if progress is None else lambda done, _: progress(n_before + done, total)


def warm_up(worker: WorkerHandle, model_id: str = MODEL, call: int = 0) -> list[float]:
    """Run a call until the last windows of timings agree, within limits; returns the milliseconds seen."""
    samples_ms: list[float] = []
    started = time.monotonic()
    while not is_stable(samples_ms) and len(samples_ms) < WARMUP_RUNS and time.monotonic() - started < WARMUP_SECONDS:
        samples_ms += worker.time(model_id, n=3, warmup=0, call=call)
    return samples_ms


def start_worker(file: TimedFile, environment: Environment, *, wait: bool = True) -> WorkerHandle:
    """Start a worker of a file's engine, with nothing loaded; see :meth:`Engine.start_worker`."""
    engine = get_engine(file.engine or environment.engine)
    options = replace(WorkerOptions.from_environment(environment), memory_limit_bytes=file.memory_limit_bytes)
    if file.plain_pages:
        options = replace(options, huge_pages=False, plain_pages=True)
    return engine.start_worker(options, wait=wait)


def is_unsure(rounds: Mapping[str, Sequence[_Round]], baseline: str, judged: Collection[str], error: float) -> bool:
    """Whether noise within one process leaves the median ratio of a judged file to the baseline's less sure."""
    medians = {name: np.median(rounds[name], axis=1) for name in (baseline, *judged)}
    return any(relative_standard_error(medians[baseline] / medians[name]) > error for name in judged)


def _interleave(
    workers: Mapping[str, FileWorker],
    config: BenchmarkConfig,
    progress: StepProgress | None,
    seed: int,
    unsure: Callable[[_Rounds], bool],
) -> _Rounds:
    """Timed milliseconds; more than the rounds of ``config`` while ``unsure``; stops where the time limit passes."""
    generator = np.random.default_rng(seed)
    names = list(workers)
    rounds: _Rounds = {name: [] for name in names}
    started, limit_s = time.monotonic(), _time_limit_s(config, len(names) - 1)
    for done in range(1, MOST_ROUNDS * config.rounds + 1):
        for index in generator.permutation(len(names)):
            name = names[index]
            rounds[name].append(workers[name].time(MODEL, n=config.runs_per_round, warmup_ms=TURN_WARMUP_MS))
        if progress is not None:
            progress(min(done, config.rounds), config.rounds)
        if done >= MIN_ROUNDS and (
            time.monotonic() - started > limit_s or (done >= config.rounds and not unsure(rounds))
        ):
            break
    return rounds


def _time_limit_s(config: BenchmarkConfig, n_files: int) -> float:
    """Seconds for all rounds. Beyond ten files, whose rounds take longer, the limit grows, so that no fewer remain."""
    return config.max_seconds * max(1.0, n_files / FILES_WITHIN_LIMIT)


def _result(timed: _Timings, name: str, workload: Workload) -> FileTiming:
    """Figures of one file."""
    timing, figures = _figures(timed, name, None)
    calls = []
    for place, call in enumerate(workload.calls if workload.has_several else ()):
        of_call, own = _figures(timed, name, place)
        calls.append(CallTiming(**asdict(call), p99_ms=of_call.p99_ms, **own))
    return FileTiming(
        name=name,
        latency=timing,
        throughput_per_second=1000.0 * workload.batch_size / timing.median_ms,
        calls=calls,
        **figures,
        **asdict(timed.facts[name]),
    )


def _figures(timed: _Timings, name: str, call: int | None) -> tuple[Timing, dict[str, Any]]:
    """Latency and speedup of a file, on the workload or on one of its calls, with the samples."""
    rounds = timed.rounds_of(name, call)
    samples_ms = [sample for round_ms in rounds for sample in round_ms]
    process_of = [process for process, round_ms in zip(timed.processes, rounds, strict=False) for _ in round_ms]
    timing = summarize(samples_ms, processes=process_of)
    speedup = Ratio(1.0, 1.0, 1.0) if name == timed.baseline else timed.ratio(name, call)  # a baseline's own is 1
    return timing, {
        "p50_ms": timing.median_ms,
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "samples_ms": samples_ms,
    }
