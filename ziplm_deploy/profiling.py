"""Latency tables: what every sub-block shape costs, timed in the form that will be deployed.

A cell is a stack of ``stack_depth`` identical layers with only attention (or only an FFN) left, exported and loaded
exactly like a family member. With T the latency of a stack, T_none that of a model without layers and T_00 that of a
stack of layers with both modules dropped:

    t(kind, 0)    = (T_00 - T_none) / (2 · depth)                  two residual additions and LayerNorms, shared evenly
    t(kind, size) = (T(kind, size) - T_none) / depth - t(other, 0)

The base (embeddings and head without layers) and the dense model are timed in the same interleaved run.
"""

from __future__ import annotations

import copy
import datetime
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoModel, PretrainedConfig

from exporters import ExportError, ExportSettings, dummy_inputs, export_encoder
from ziplm_deploy.architectures import architecture_of, layers_of, model_shape
from ziplm_deploy.artifacts import Cell, LatencyTable, MachineInfo, ModelShape, ModuleKind, Timing, Variant
from ziplm_deploy.config import Environment, ExportConfig, ProfileConfig
from ziplm_deploy.engines import Engine, WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.errors import IncompatibleArtifactError, UnsupportedModelError
from ziplm_deploy.machine import machine_info
from ziplm_deploy.pruning.levels import ffn_widths, head_counts
from ziplm_deploy.resizing import random_resized, shared_copy
from ziplm_deploy.statistics import (
    Floats,
    bootstrap_medians,
    interval,
    is_stable,
    relative_standard_error,
    remove_drift,
    summarize,
)

Progress = Callable[[int, int], None]  # (steps done, steps at most): exports, then rounds
Wrap = Callable[[nn.Module], nn.Module]

NONE, BASE, DENSE = "none", "base", "dense"
TINY_VOCABULARY = 64  # a stack needs no real vocabulary, and its export would be mostly that
# A cell is also sure enough when its error, in every layer of the model, is this fraction of the dense latency.
NEGLIGIBLE = 0.0005
REMEASURE_ROUNDS = 10
REMEASURE_SHARE = 0.2  # of the time limit, kept back for suspicious cells
MIN_ANCHORS = 8
# The dense model's error is in every predicted speedup, a cell's only in its share: it is timed more often.
EXTRA_DENSE = 2
LEAST_MS = 1e-4


@dataclass
class _Samples:
    """Timings of all models in the order they were taken, and without the machine's speed changes."""

    order: list[str] = field(default_factory=list)  # model id of each sample
    raw_ms: list[float] = field(default_factory=list)
    ms: dict[str, Floats] = field(default_factory=dict)  # model id -> corrected milliseconds
    speeds: Floats = field(default_factory=lambda: np.ones(1))
    rounds: int = 0
    remeasured: int = 0

    def add(self, order: list[str], raw_ms: list[float]) -> None:
        self.order += order
        self.raw_ms += raw_ms
        ids = np.asarray(self.order)
        labels = np.unique(ids, return_inverse=True)[1]
        corrected, self.speeds = remove_drift(labels, self.raw_ms)
        self.ms = {str(model_id): corrected[ids == model_id] for model_id in np.unique(ids)}


def measure_table(
    dense: nn.Module,
    environment: Environment,
    profile: ProfileConfig,
    export: ExportConfig,
    *,
    output_names: Sequence[str],
    wrap: Wrap | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> LatencyTable:
    """Measure the table of ``dense`` (a transformers model; its weights do not matter, only its shapes).

    ``wrap`` puts what else is deployed around a model (pooling), ``output_names`` are the outputs of that.

    Raises:
        UnsupportedModelError: the architecture cannot be pruned or exported.
        EnvironmentMismatchError: more threads than granted.
        EngineError: the engine rejects a cell, dies or hangs.
    """
    started = time.monotonic()
    shape = model_shape(dense.config)  # type: ignore[arg-type]
    engine = get_engine(environment.engine)
    options = _worker_options(engine, environment, export)
    models = list(_models(dense, shape, profile, wrap or (lambda model: model), list(output_names)))
    steps = len(models) + profile.max_rounds
    report = progress or (lambda done, total: None)
    with engine.start_worker(options) as worker:
        for done, (model_id, build, names) in enumerate(models, start=1):
            _export_and_load(worker, model_id, build(), names, environment, export)
            report(done, steps)
        measuring = time.monotonic()
        samples = _measure(worker, shape, profile, lambda rounds: report(len(models) + rounds, steps), seed)
        _remeasure(worker, samples, shape, profile, seed)
        measuring_seconds = time.monotonic() - measuring
    report(steps, steps)
    cells, noise = _cells(samples, shape, profile), _noise(samples)
    table = LatencyTable(
        machine=machine_info(),
        engine=engine.name,
        engine_version=engine.version(),
        environment=environment,
        shape=shape,
        graph=graph_of(dense, output_names),
        shapes=export.shapes,
        opset=export.opset,
        stack_depth=profile.stack_depth,
        base=summarize(samples.ms[BASE]),
        dense=summarize(samples.ms[DENSE]),
        cells=cells,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        measuring_seconds=measuring_seconds,
        total_seconds=time.monotonic() - started,
        noise=noise,
    )
    table.noise["sum_of_parts_over_dense"] = table.predict_dense_ms() / table.dense.median_ms
    return table


def _worker_options(engine: Engine, environment: Environment, export: ExportConfig) -> WorkerOptions:
    return WorkerOptions(
        threads=environment.threads,
        batch_size=environment.batch_size,
        seq_len=environment.seq_len,
        disabled_optimizers=engine.disabled_optimizers(export.shapes),
        shared_arena=True,  # sixty sessions with an arena each would take gigabytes
    )


def graph_of(dense: nn.Module, output_names: Sequence[str]) -> str:
    """What a graph holds beside the prunable shapes, in words; tables of models that differ in it are not shared."""
    config: Any = dense.config
    parts = [type(dense).__name__, str(getattr(config, "hidden_act", getattr(config, "activation", "")))]
    if hasattr(config, "image_size"):
        parts.append(f"images of {config.image_size} in patches of {config.patch_size}")
    else:
        parts.append(f"vocabulary {config.vocab_size}, {config.num_labels} labels")
    return ", ".join([*parts, f"outputs {' '.join(output_names)}"])


def without_layers(dense: nn.Module) -> nn.Module:
    """Embeddings and head of ``dense`` with no layer between; shares its parameters."""
    base = shared_copy(dense)
    del layers_of(base)[:]
    return base


def random_stack(config: PretrainedConfig, depth: int) -> nn.Module:
    """A model of ``depth`` full layers of this configuration, random weights, a tiny vocabulary and no head."""
    config = copy.deepcopy(config)
    setattr(config, architecture_of(config).config_layers, depth)
    if hasattr(config, "vocab_size"):
        config.vocab_size = min(config.vocab_size, TINY_VOCABULARY)
    model: nn.Module = AutoModel.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    return model.eval()


def cell_sizes(shape: ModelShape, profile: ProfileConfig) -> dict[ModuleKind, list[int]]:
    """Sizes that a table holds for each kind, descending, full size and 0 included."""
    return {
        "attention": sorted(head_counts(shape.n_heads), reverse=True),
        "ffn": ffn_widths(shape.intermediate_size, profile.width_ratio, profile.width_align),
    }


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
    variant: Variant = "fp32",
    allow_foreign: bool = False,
) -> None:
    """Refuse a table that was not measured for this model in this environment.

    ``allow_foreign`` accepts another machine or engine version, nothing else.

    Raises:
        IncompatibleArtifactError: lists everything that differs.
    """
    pairs: list[tuple[str, object, object]] = [
        ("engine", engine, table.engine),
        ("environment", environment.describe(), table.environment.describe()),
        ("model shape", shape.model_dump(), table.shape.model_dump()),
        ("graph", graph, table.graph),
        ("variant", variant, table.variant),
        ("export shapes", shapes, table.shapes),
        ("opset", opset, table.opset),
    ]
    if not allow_foreign:
        pairs += [
            ("machine", machine.fingerprint, table.machine.fingerprint),
            ("engine version", engine_version, table.engine_version),
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


def _models(
    dense: nn.Module, shape: ModelShape, profile: ProfileConfig, wrap: Wrap, output_names: list[str]
) -> Iterator[tuple[str, Callable[[], nn.Module], list[str]]]:
    """(id, builder, output names) of every model that a table needs; built one at a time to bound memory."""
    hidden = ["last_hidden_state"]
    depth = profile.stack_depth
    stack = random_stack(dense.config, depth)  # type: ignore[arg-type]

    def cell(kind: ModuleKind, size: int) -> nn.Module:
        sizes = {"attention": 0, "ffn": 0} | {kind: size}
        return random_resized(stack, {f"{layer}.{name}": sizes[name] for layer in range(depth) for name in sizes})

    yield DENSE, lambda: wrap(dense), output_names
    yield BASE, lambda: wrap(without_layers(dense)), output_names
    yield NONE, lambda: without_layers(stack), hidden
    for kind, sizes in cell_sizes(shape, profile).items():
        for size in sizes:
            if (kind, size) != ("ffn", 0):  # the same model as attention of size 0
                yield _cell_id(kind, size), lambda kind=kind, size=size: cell(kind, size), hidden  # type: ignore[misc]


def _cell_id(kind: str, size: int) -> str:
    return f"{kind} {size}" if size else "both dropped"


def _export_and_load(
    worker: WorkerHandle,
    model_id: str,
    model: nn.Module,
    output_names: list[str],
    environment: Environment,
    export: ExportConfig,
) -> None:
    settings = ExportSettings(export.shapes, export.opset, environment.batch_size, environment.seq_len)
    with tempfile.TemporaryDirectory(prefix="ziplm-profile-") as folder:
        path = Path(folder) / f"{model_id.replace(' ', '-')}.onnx"
        try:
            export_encoder(model, dummy_inputs(model, settings), output_names, path, settings)
        except ExportError as error:
            raise UnsupportedModelError(f"cannot export the table's model {model_id!r}: {error}") from error
        worker.load(model_id, path)


def _measure(
    worker: WorkerHandle, shape: ModelShape, profile: ProfileConfig, report: Callable[[int], None], seed: int
) -> _Samples:
    """Interleaved rounds in random order until every cell is sure, or a limit is reached."""
    generator = np.random.default_rng(seed)
    sizes = cell_sizes(shape, profile)
    ids = [DENSE, BASE, NONE, *dict.fromkeys(_cell_id(kind, size) for kind in sizes for size in sizes[kind])]
    samples = _Samples()
    deadline = time.monotonic() + (1 - REMEASURE_SHARE) * profile.max_seconds
    _warm_up(worker, ids)
    # Three rounds at least: a median of fewer is none.
    while samples.rounds < profile.max_rounds and (samples.rounds < 3 or time.monotonic() < deadline):
        _round(worker, [*ids, *[DENSE] * EXTRA_DENSE], samples, generator)
        samples.rounds += 1
        report(samples.rounds)
        if samples.rounds >= profile.min_rounds and not _unsure(samples, shape, profile):
            break
    return samples


def _warm_up(worker: WorkerHandle, ids: Sequence[str]) -> None:
    worker.time_many(ids, warmup=0)  # first runs allocate and pack
    dense_ms: list[float] = []
    while not is_stable(dense_ms) and len(dense_ms) < 24:
        dense_ms += worker.time(DENSE, n=2, warmup=0)


def _round(worker: WorkerHandle, ids: Sequence[str], samples: _Samples, generator: np.random.Generator) -> None:
    order = [ids[index] for index in generator.permutation(len(ids))]
    samples.add(order, worker.time_many(order))


def _unsure(samples: _Samples, shape: ModelShape, profile: ProfileConfig) -> list[str]:
    """Models whose median is neither precise by itself nor negligible in the whole model."""
    negligible_ms = NEGLIGIBLE * float(np.median(samples.ms[DENSE]))
    unsure = []
    for model_id, ms in samples.ms.items():
        error = relative_standard_error(ms)
        multiplicity = 1.0 if model_id in (DENSE, BASE) else shape.n_layers / profile.stack_depth
        precision = profile.precision / 2 if model_id == DENSE else profile.precision
        if error > precision and error * float(np.median(ms)) * multiplicity > negligible_ms:
            unsure.append(model_id)
    return unsure


def _remeasure(worker: WorkerHandle, samples: _Samples, shape: ModelShape, profile: ProfileConfig, seed: int) -> None:
    """More rounds for cells that are noisy or slower than a larger one; a table may stay non-monotone, if truly so."""
    suspects = sorted({*_unsure(samples, shape, profile), *_non_monotone(samples, shape, profile)})
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
        _round(worker, [*suspects, *anchors], samples, generator)
    samples.remeasured = len(suspects)


def _non_monotone(samples: _Samples, shape: ModelShape, profile: ProfileConfig) -> list[str]:
    """Neighbouring sizes of which the smaller one looks slower."""
    suspects = []
    for kind, sizes in cell_sizes(shape, profile).items():
        ids = [_cell_id(kind, size) for size in sizes]
        medians = [float(np.median(samples.ms[model_id])) for model_id in ids]
        for index in range(len(ids) - 1):
            if medians[index + 1] > medians[index]:
                suspects += ids[index : index + 2]
    return suspects


def _cells(samples: _Samples, shape: ModelShape, profile: ProfileConfig) -> list[Cell]:
    depth = profile.stack_depth
    none, dropped = samples.ms[NONE], samples.ms[_cell_id("attention", 0)]
    none_boot, dropped_boot = bootstrap_medians(none, seed=1), bootstrap_medians(dropped, seed=2)
    none_ms, dropped_ms = float(np.median(none)), float(np.median(dropped))
    zero_ms, zero_boot = (dropped_ms - none_ms) / (2 * depth), (dropped_boot - none_boot) / (2 * depth)
    cells = []
    for kind, sizes in cell_sizes(shape, profile).items():
        for size in sizes:
            ms = samples.ms[_cell_id(kind, size)]
            boot = (bootstrap_medians(ms, seed=3 + size) - none_boot) / depth - zero_boot
            cells.append(Cell(kind=kind, size=size, timing=_cell_timing((ms - none_ms) / depth - zero_ms, boot)))
    return cells


def _cell_timing(values_ms: Floats, boot_ms: Floats) -> Timing:
    low, high = interval(boot_ms)
    median, p90, p99 = np.quantile(values_ms, [0.5, 0.9, 0.99])
    milliseconds = {"median_ms": median, "low_ms": low, "high_ms": high, "p90_ms": p90, "p99_ms": p99}
    # Differences of noisy medians can fall below zero in tiny models; time cannot.
    return Timing(n=values_ms.size, **{name: max(float(value), LEAST_MS) for name, value in milliseconds.items()})


def _noise(samples: _Samples) -> dict[str, float]:
    dense = samples.ms[DENSE]
    slow, fast = np.quantile(samples.speeds, [0.9, 0.1])
    return {
        "speed_drift_p90_over_p10": float(slow / fast),
        "rounds": float(samples.rounds),
        "remeasured": float(samples.remeasured),
        "worst_relative_error": max(relative_standard_error(ms) for ms in samples.ms.values()),
        "dense_odd_over_even_rounds": float(np.median(dense[1::2]) / np.median(dense[::2])) if dense.size > 1 else 1.0,
    }
