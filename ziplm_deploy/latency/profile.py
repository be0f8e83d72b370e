"""Latency tables: what every sub-block shape costs, timed as the files that will be deployed.

A cell is a stack of ``stack_depth`` identical layers with only attention (or only an FFN) left, exported, compressed
and loaded exactly like a family member (:mod:`ziplm_deploy.latency.models`); see :mod:`ziplm_deploy.latency.cells` for
how its latency follows. The base (embeddings and head without layers) and the dense model are timed in the same
interleaved run. The dense model is what speedups are over: as exported, on the baseline engine, which may be another.
A few pruned models are timed with them, and correct sums of cells (:mod:`ziplm_deploy.latency.correction`). Every model
with all its layers has processes of its own, as where it serves: several, for where one lies in memory shifts latency.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ziplm_deploy.engines import TURN_WARMUP_MS, Timed, WorkerHandle, get_engine
from ziplm_deploy.engines.trial import ModelRefusedError, Trial
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.benchmark import warm_up
from ziplm_deploy.latency.cells import Samples, cells_of, noise_of, non_monotone, unsure, wholes_of
from ziplm_deploy.latency.grid import BASE, DENSE, DENSE_AS_SERVED, WHOLE_SHARES, Grid
from ziplm_deploy.latency.models import TableModel, table_models
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.machine.locks import timing_alone
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.progress import Note, StepProgress

REMEASURE_ROUNDS = 10
REMEASURE_SHARE = 0.2  # of the time limit, kept back for suspicious cells
MIN_ANCHORS = 8
# Errors of models with all their layers are in every predicted speedup, a cell's only in its share: they are timed more
# often, and in several processes that take turns: one differs from the next by 1 to 3 %, and sometimes by much more.
EXTRA_DENSE, EXTRA_WHOLES = 2, 1
WHOLE_PROCESSES = 3
MEMORY_SHARE = 4  # processes of whole models may take one in so many bytes of the machine's memory
PROCESS_BYTES = 80 * 2**20  # of a worker, without its model


class Workers:
    """The workers of one table; times models of all of them in one order, as a single worker would.

    Those of a model that has several take turns: each of its runs of a call is in another process than the last.
    """

    def __init__(self, of_model: Mapping[str, Sequence[WorkerHandle]], n_calls: int = 1) -> None:
        self._of_model, self._n_calls = of_model, n_calls
        self._turns = {
            (model_id, call): itertools.cycle(workers)
            for model_id, workers in of_model.items()
            for call in range(n_calls)
        }

    def load(self, model_id: str, path: Path) -> None:
        """Load a model into each of its processes, and run it once on every call: first runs allocate and pack, and
        llama.cpp reads its file no sooner."""
        for worker in self._of_model[model_id]:
            worker.load(model_id, path)
            worker.time_many([(model_id, call) for call in range(self._n_calls)], warmup=0)

    def warm_up(self, model_id: str) -> None:
        """Run a model in each of its processes, on every call, until timings agree."""
        for worker in self._of_model[model_id]:
            for call in range(self._n_calls):
                warm_up(worker, model_id, call)

    def time_many(self, order: Sequence[Timed], warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        """Milliseconds of one run of each model and call in ``order``, in that order, whichever engine has it."""
        samples_ms: list[float] = []
        turns = [(next(self._turns[timed]), timed) for timed in order]
        for worker, group in itertools.groupby(turns, key=lambda turn: turn[0]):
            samples_ms += worker.time_many([timed for _, timed in group], warmup, warmup_ms)
        return samples_ms


@dataclass(frozen=True)
class _Measurement:
    samples: Samples
    refused: dict[str, str]  # model id -> why the engine does not run it
    versions: dict[str, str]  # of each engine
    seconds: float  # exports not included


def measure_table(
    request: TableRequest, progress: StepProgress | None = None, seed: int = 0, *, note: Note | None = None
) -> LatencyTable:
    """Measure the table that is asked for. ``progress`` counts exports, then rounds.

    Another measurement of this user on this machine is waited for; ``note`` is told so.

    Raises:
        UnsupportedModelError: the architecture cannot be pruned or exported.
        EnvironmentMismatchError: more threads than granted.
        EngineError: an engine is missing, rejects a model that no table can do without, dies or hangs. Other cells that
            it cannot run are left out, see ``LatencyTable.refused``.
    """
    started = time.monotonic()
    shape, environment, treatment = request.shape, request.environment, request.served
    measured = _measure_models(request, progress or (lambda done, total: None), seed, note)
    samples = measured.samples
    table = LatencyTable(
        machine=machine_info(),
        engine=environment.engine,
        engine_version=measured.versions[environment.engine],
        environment=environment,
        shape=shape,
        graph=request.graph,
        variant=treatment.variant,
        form=treatment.description,
        baseline_engine=request.baseline,
        baseline_engine_version=measured.versions[request.baseline],
        shapes=request.export.shapes,
        opset=request.export.opset,
        stack_depth=request.profile.stack_depth,
        base=samples.timing(BASE),
        dense=samples.timing(DENSE),
        unpruned=samples.timing(DENSE_AS_SERVED) if request.times_dense_as_served else None,
        cells=cells_of(samples, request.grid),
        wholes=wholes_of(samples, request.grid),
        refused=measured.refused,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        measuring_seconds=measured.seconds,
        total_seconds=time.monotonic() - started,
        noise=noise_of(samples),
    )
    table.noise["sum_of_parts_over_dense"] = table.sum_dense_ms() / (table.unpruned or table.dense).median_ms
    return table


def _measure_models(request: TableRequest, report: StepProgress, seed: int, note: Note | None) -> _Measurement:
    """Export, load and time all models."""
    models = list(table_models(request))
    steps = len(models) + request.profile.max_rounds
    ids = [model.model_id for model in models]
    with contextlib.ExitStack() as stack:
        engine = request.environment.engine
        together = stack.enter_context(request.start_worker(engine, holds_many=True, wait=False))
        whole_ids = sorted(request.grid.whole_ids.intersection(ids))
        n_processes = _whole_processes(request.dense, machine_info().memory_bytes)
        alone = {
            model_id: [
                stack.enter_context(request.start_worker(request.engine_of(model_id), wait=False))
                for _ in range(n_processes)
            ]
            for model_id in whole_ids
        }
        calls = request.environment.workload.calls
        workers = Workers({model_id: alone.get(model_id, [together]) for model_id in ids}, len(calls))
        refused = _load_models(request, models, workers, lambda done: report(done, steps))
        ids = [model_id for model_id in ids if model_id not in refused]
        with timing_alone(note):
            measuring = time.monotonic()
            samples = Samples(request.environment.workload.weights)
            told = lambda rounds: report(len(models) + rounds, steps)  # noqa: E731
            _measure(workers, ids, samples, request.grid, told, seed)
            _remeasure(workers, samples, request.grid, seed)
            seconds = time.monotonic() - measuring
    report(steps, steps)
    return _Measurement(
        samples, refused, {request.baseline: alone[DENSE][0].version, engine: together.version}, seconds
    )


def _whole_processes(dense: nn.Module, memory_bytes: int) -> int:
    """How many processes each whole model gets: fewer where they would take too much of the machine's memory."""
    weights = sum(parameter.numel() * 4 for parameter in dense.parameters())
    once = weights * (2 + sum(WHOLE_SHARES)) + PROCESS_BYTES * (2 + len(WHOLE_SHARES))  # dense, and as served
    return max(1, min(WHOLE_PROCESSES, int(memory_bytes / MEMORY_SHARE / once)))


def _load_models(
    request: TableRequest, models: Sequence[TableModel], workers: Workers, report: Callable[[int], None]
) -> dict[str, str]:
    """Export every model and load it into its worker, but for those that are refused: their ids, and why."""
    refused: dict[str, str] = {}
    suffix = Path(request.served.variant.file_name).suffix
    with contextlib.ExitStack() as stack:
        trials = {
            name: stack.enter_context(Trial(functools.partial(request.start_worker, name)))
            for name in {request.environment.engine, request.baseline}
            if get_engine(name).may_abort
        }
        for done, model in enumerate(models, start=1):
            with tempfile.TemporaryDirectory(prefix="profile-", dir=scratch_root()) as folder:
                path = Path(folder) / f"{model.model_id.replace(' ', '-')}{suffix}"
                stock = request.export.stock_optimum
                model.export(path, request.settings, request.form, stock_optimum=stock)
                reason = _refusal(model.model_id, trials.get(request.engine_of(model.model_id)), path, request.grid)
                if reason:
                    refused[model.model_id] = reason
                else:
                    workers.load(model.model_id, path)
            report(done)
    return refused


def _refusal(model_id: str, trial: Trial | None, path: Path, grid: Grid) -> str:
    """Why the engine cannot run a cell that a table can do without; empty if it can."""
    if trial is None:
        return ""
    try:
        trial.run(path)
    except ModelRefusedError as error:
        if model_id not in grid.needed_ids:
            return str(error).replace(str(path), path.name)  # a table can do without it, and nobody removes files
        kept = Path(tempfile.mkdtemp(prefix="ziplm-refused-")) / path.name  # the message says how to reproduce it
        shutil.copyfile(path, kept)
        raise EngineError(str(error).replace(str(path), str(kept))) from error
    return ""


def _measure(
    workers: Workers, ids: Sequence[str], samples: Samples, grid: Grid, report: Callable[[int], None], seed: int
) -> None:
    """Interleaved rounds in random order until every cell is sure, or a limit is reached."""
    profile = grid.profile
    generator = np.random.default_rng(seed)
    deadline = time.monotonic() + (1 - REMEASURE_SHARE) * profile.max_seconds
    extra = [DENSE] * EXTRA_DENSE + [model_id for model_id in ids if model_id in grid.pruned_samples] * EXTRA_WHOLES
    for model_id in ids:
        if model_id in grid.whole_ids:
            workers.warm_up(model_id)
    # Three rounds at least: a median of fewer is none.
    while samples.rounds < profile.max_rounds and (samples.rounds < 3 or time.monotonic() < deadline):
        _round(workers, [*ids, *extra], samples, generator)
        samples.rounds += 1
        report(samples.rounds)
        if samples.rounds >= profile.min_rounds and not unsure(samples, grid):
            break


def _round(workers: Workers, ids: Sequence[str], samples: Samples, generator: np.random.Generator) -> None:
    timed = samples.on_every_call(ids)
    order = [timed[index] for index in generator.permutation(len(timed))]
    samples.add(order, workers.time_many(order, warmup_ms=TURN_WARMUP_MS))


def _remeasure(workers: Workers, samples: Samples, grid: Grid, seed: int) -> None:
    """More rounds for cells that are noisy or slower than a larger one; a table may stay non-monotone, if truly so."""
    suspects = sorted({*unsure(samples, grid), *non_monotone(samples, grid)})
    if not suspects:
        return
    generator = np.random.default_rng([seed, 1])
    sure = [model_id for model_id in samples.of_calls if model_id not in suspects]
    deadline = time.monotonic() + REMEASURE_SHARE * grid.profile.max_seconds
    for _ in range(REMEASURE_ROUNDS):
        if time.monotonic() > deadline:
            break
        # Models that are sure tell how fast the machine is now.
        anchors = generator.permutation(sure)[: max(len(suspects), MIN_ANCHORS)].tolist()
        _round(workers, [*suspects, *anchors], samples, generator)
    samples.remeasured = len(suspects)
