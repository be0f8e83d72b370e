"""Latency tables: what every sub-block shape costs, timed in the form that will be deployed.

A cell is a stack of ``stack_depth`` identical layers with only attention (or only an FFN) left, exported, compressed
and loaded exactly like a family member (:mod:`ziplm_deploy.latency.models`); see :mod:`ziplm_deploy.latency.cells` for
how its latency follows. The base (embeddings and head without layers) and the dense model are timed in the same
interleaved run. The dense model is what speedups are over: float32, on the baseline engine, which may be another one.
A few pruned models are timed with them, and correct sums of cells (:mod:`ziplm_deploy.latency.correction`). Every model
with all its layers has a process of its own, as where it serves.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ziplm_deploy.engines import TURN_WARMUP_MS, WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.engines.trial import ModelRefusedError, Trial
from ziplm_deploy.errors import EngineError, IncompatibleArtifactError
from ziplm_deploy.latency.cells import Samples, cells_of, noise_of, non_monotone, unsure, wholes_of
from ziplm_deploy.latency.models import (
    BASE,
    DENSE,
    DENSE_AS_SERVED,
    TableModel,
    Wrap,
    needed_ids,
    table_models,
    whole_ids,
)
from ziplm_deploy.latency.statistics import is_stable, summarize
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import MachineInfo, machine_info
from ziplm_deploy.models.deployed import FLOAT32, Treatment
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.models.shape import ModelShape
from ziplm_deploy.recipe import EngineName, Environment, ExportConfig, ProfileConfig, Variant

Progress = Callable[[int, int], None]  # (steps done, steps at most): exports, then rounds


REMEASURE_ROUNDS = 10


REMEASURE_SHARE = 0.2  # of the time limit, kept back for suspicious cells


MIN_ANCHORS = 8


# The dense model's error is in every predicted speedup, a cell's only in its share: it is timed more often.
EXTRA_DENSE = 2


@dataclass(frozen=True)
class _Place:
    """Where a table's models run: the dense reference on the baseline engine, all others on the environment's."""

    environment: Environment
    export: ExportConfig
    baseline: EngineName

    def engine_of(self, model_id: str) -> EngineName:
        return self.baseline if model_id == DENSE else self.environment.engine

    def start_worker(self, name: EngineName, *, holds_many: bool = False) -> WorkerHandle:
        engine = get_engine(name)
        options = WorkerOptions(
            threads=self.environment.threads,
            batch_size=self.environment.workload.batch_size,
            seq_len=self.environment.workload.seq_len,
            shared_arena=holds_many,  # sixty sessions with an arena each would take gigabytes
        )
        return engine.start_worker(options)


class Workers:
    """The workers of one table; times models of all of them in one order, as a single worker would."""

    def __init__(self, of_model: Mapping[str, WorkerHandle]) -> None:
        self._of_model = of_model

    def load(self, model_id: str, path: Path) -> None:
        self._of_model[model_id].load(model_id, path)

    def time(self, model_id: str, n: int, warmup: int = 1) -> list[float]:
        return self._of_model[model_id].time(model_id, n=n, warmup=warmup)

    def time_many(self, order: Sequence[str], warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        """Milliseconds of one run of each model in ``order``, in that order, whichever engine has it."""
        samples_ms: list[float] = []
        for worker, ids in itertools.groupby(order, key=self._of_model.__getitem__):
            samples_ms += worker.time_many(list(ids), warmup, warmup_ms)
        return samples_ms


@dataclass(frozen=True)
class _Measurement:
    samples: Samples
    refused: dict[str, str]  # model id -> why the engine does not run it
    versions: dict[str, str]  # of each engine
    seconds: float  # exports not included


def measure_table(
    dense: nn.Module,
    environment: Environment,
    profile: ProfileConfig,
    export: ExportConfig,
    *,
    output_names: Sequence[str],
    wrap: Wrap | None = None,
    form: Treatment | None = None,
    baseline_engine: EngineName | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> LatencyTable:
    """Measure the table of ``dense`` (a transformers model; its weights do not matter, only its shapes).

    ``wrap`` puts what else is deployed around a model (pooling), ``output_names`` are the outputs of that. ``form`` is
    how members are compressed (None: not at all); cells and base go through it, the dense reference does not.
    ``baseline_engine`` runs that reference (None: the environment's engine).

    Raises:
        UnsupportedModelError: the architecture cannot be pruned or exported.
        EnvironmentMismatchError: more threads than granted.
        EngineError: an engine is missing, rejects a model that no table can do without, dies or hangs. Other cells that
            it cannot run are left out, see ``LatencyTable.refused``.
    """
    started = time.monotonic()
    shape = model_shape(dense.config)  # type: ignore[arg-type]
    place = _Place(environment, export, baseline_engine or environment.engine)
    names, deployed, wrap = tuple(output_names), form or FLOAT32, wrap or (lambda model: model)
    unpruned = form is not None or place.baseline != environment.engine
    models = list(table_models(dense, profile, wrap, names, deployed, unpruned=unpruned))
    measured = _measure_models(models, place, shape, profile, progress or (lambda done, total: None), seed)
    samples = measured.samples
    table = LatencyTable(
        machine=machine_info(),
        engine=environment.engine,
        engine_version=measured.versions[environment.engine],
        environment=environment,
        shape=shape,
        graph=graph_of(dense, output_names),
        variant=deployed.variant,
        form=deployed.description,
        baseline_engine=place.baseline,
        baseline_engine_version=measured.versions[place.baseline],
        shapes=export.shapes,
        opset=export.opset,
        stack_depth=profile.stack_depth,
        base=summarize(samples.ms[BASE]),
        dense=summarize(samples.ms[DENSE]),
        unpruned=summarize(samples.ms[DENSE_AS_SERVED]) if unpruned else None,
        cells=cells_of(samples, shape, profile),
        wholes=wholes_of(samples, shape, profile),
        refused=measured.refused,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        measuring_seconds=measured.seconds,
        total_seconds=time.monotonic() - started,
        noise=noise_of(samples),
    )
    table.noise["sum_of_parts_over_dense"] = table.sum_dense_ms() / (table.unpruned or table.dense).median_ms
    return table


def _measure_models(
    models: Sequence[TableModel], place: _Place, shape: ModelShape, profile: ProfileConfig, report: Progress, seed: int
) -> _Measurement:
    """Export, load and time all models."""
    steps = len(models) + profile.max_rounds
    ids = [model.model_id for model in models]
    refused: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        engine = place.environment.engine
        together = stack.enter_context(place.start_worker(engine, holds_many=True))
        alone = {
            model_id: stack.enter_context(place.start_worker(place.engine_of(model_id)))
            for model_id in sorted(whole_ids(shape, profile).intersection(ids))
        }
        workers = Workers({model_id: alone.get(model_id, together) for model_id in ids})
        trials = {
            name: stack.enter_context(Trial(functools.partial(place.start_worker, name)))
            for name in {engine, place.baseline}
            if get_engine(name).may_abort
        }
        for done, model in enumerate(models, start=1):
            with tempfile.TemporaryDirectory(prefix="ziplm-profile-") as folder:
                path = Path(folder) / f"{model.model_id.replace(' ', '-')}.onnx"
                model.export(path, place.environment, place.export)
                reason = _refusal(model, trials.get(place.engine_of(model.model_id)), path, shape)
                if reason:
                    refused[model.model_id] = reason
                else:
                    workers.load(model.model_id, path)
            report(done, steps)
        ids = [model_id for model_id in ids if model_id not in refused]
        measuring = time.monotonic()
        samples = _measure(workers, ids, shape, profile, lambda rounds: report(len(models) + rounds, steps), seed)
        _remeasure(workers, samples, shape, profile, seed)
        seconds = time.monotonic() - measuring
    report(steps, steps)
    return _Measurement(samples, refused, {place.baseline: alone[DENSE].version, engine: together.version}, seconds)


def _refusal(model: TableModel, trial: Trial | None, path: Path, shape: ModelShape) -> str:
    """Why the engine cannot run a cell that a table can do without; empty if it can."""
    if trial is None:
        return ""
    try:
        trial.run(path)
    except ModelRefusedError as error:
        kept = Path(tempfile.mkdtemp(prefix="ziplm-refused-")) / path.name  # the message says how to reproduce it
        shutil.copyfile(path, kept)
        reason = str(error).replace(str(path), str(kept))
        if model.model_id in needed_ids(shape):
            raise EngineError(reason) from error
        return reason
    return ""


def graph_of(dense: nn.Module, output_names: Sequence[str]) -> str:
    """What a graph holds beside the prunable shapes, in words; tables of models that differ in it are not shared."""
    config: Any = dense.config
    parts = [type(dense).__name__, str(getattr(config, "hidden_act", getattr(config, "activation", "")))]
    if hasattr(config, "image_size"):
        parts.append(f"images of {config.image_size} in patches of {config.patch_size}")
    else:
        parts.append(f"vocabulary {config.vocab_size}, {config.num_labels} labels")
    return ", ".join([*parts, f"outputs {' '.join(output_names)}"])


def check_table(
    table: LatencyTable,
    *,
    machine: MachineInfo,
    engine: str,
    engine_version: str,
    environment: Environment,
    shape: ModelShape,
    graph: str,
    shapes: str,
    opset: int,
    variant: Variant = Variant.FP32,
    form: str = "",
    baseline_engine: EngineName | None = None,
    baseline_engine_version: str | None = None,
    allow_foreign: bool = False,
) -> None:
    """Refuse a table that was not measured for this model in this environment.

    ``form`` is the description of the :class:`Treatment`. Baseline engine and version default to those of the
    cells. ``allow_foreign`` accepts another machine or engine version, nothing else.

    Raises:
        IncompatibleArtifactError: lists everything that differs.
    """
    pairs: list[tuple[str, object, object]] = [
        ("engine", engine, table.engine),
        ("environment", environment.describe(), table.environment.describe()),
        ("model shape", shape.model_dump(), table.shape.model_dump()),
        ("graph", graph, table.graph),
        ("variant", variant, table.variant),
        ("form", form, table.form),
        ("baseline engine", baseline_engine or engine, table.baseline_engine),
        ("export shapes", shapes, table.shapes),
        ("opset", opset, table.opset),
    ]
    if not allow_foreign:
        pairs += [
            ("machine", machine.fingerprint, table.machine.fingerprint),
            ("engine version", engine_version, table.engine_version),
            ("baseline engine version", baseline_engine_version or engine_version, table.baseline_engine_version),
        ]
    differing = [f"{what}: expected {expected}, found {found}" for what, expected, found in pairs if expected != found]
    for kind, full in (("attention", shape.n_heads), ("ffn", shape.intermediate_size)):
        missing = {0, full} - {cell.size for cell in table.cells if cell.kind == kind}
        differing += [f"{kind} of size {size}: expected a measured cell, found none" for size in sorted(missing)]
    if differing:
        raise IncompatibleArtifactError(
            "the latency table does not fit:\n  "
            + "\n  ".join(differing)
            + "\nmeasure one with `ziplm-deploy profile`, or set profile.allow_foreign_table to accept another machine "
            "or engine version (predictions may then be far off)"
        )


def _measure(
    workers: Workers,
    ids: Sequence[str],
    shape: ModelShape,
    profile: ProfileConfig,
    report: Callable[[int], None],
    seed: int,
) -> Samples:
    """Interleaved rounds in random order until every cell is sure, or a limit is reached."""
    generator = np.random.default_rng(seed)
    samples = Samples()
    deadline = time.monotonic() + (1 - REMEASURE_SHARE) * profile.max_seconds
    _warm_up(workers, ids, whole_ids(shape, profile))
    # Three rounds at least: a median of fewer is none.
    while samples.rounds < profile.max_rounds and (samples.rounds < 3 or time.monotonic() < deadline):
        _round(workers, [*ids, *[DENSE] * EXTRA_DENSE], samples, generator)
        samples.rounds += 1
        report(samples.rounds)
        if samples.rounds >= profile.min_rounds and not unsure(samples, shape, profile):
            break
    return samples


def _warm_up(workers: Workers, ids: Sequence[str], alone: Collection[str]) -> None:
    workers.time_many(ids, warmup=0)  # first runs allocate and pack
    for model_id in (model_id for model_id in ids if model_id in alone):  # each in a process of its own
        seen_ms: list[float] = []
        while not is_stable(seen_ms) and len(seen_ms) < 24:
            seen_ms += workers.time(model_id, n=2, warmup=0)


def _round(workers: Workers, ids: Sequence[str], samples: Samples, generator: np.random.Generator) -> None:
    order = [ids[index] for index in generator.permutation(len(ids))]
    samples.add(order, workers.time_many(order, warmup_ms=TURN_WARMUP_MS))


def _remeasure(workers: Workers, samples: Samples, shape: ModelShape, profile: ProfileConfig, seed: int) -> None:
    """More rounds for cells that are noisy or slower than a larger one; a table may stay non-monotone, if truly so."""
    suspects = sorted({*unsure(samples, shape, profile), *non_monotone(samples, shape, profile)})
    if not suspects:
        return
    generator = np.random.default_rng([seed, 1])
    sure = [model_id for model_id in samples.ms if model_id not in suspects]
    deadline = time.monotonic() + REMEASURE_SHARE * profile.max_seconds
    for _ in range(REMEASURE_ROUNDS):
        if time.monotonic() > deadline:
            break
        # Models that are sure tell how fast the machine is now.
        anchors = generator.permutation(sure)[: max(len(suspects), MIN_ANCHORS)].tolist()
        _round(workers, [*suspects, *anchors], samples, generator)
    samples.remeasured = len(suspects)
