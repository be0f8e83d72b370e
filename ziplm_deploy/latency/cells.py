"""Cells of a table from the timings of its models, and which timings are not sure enough yet.

With T the latency of a stack of n layers that have only attention (or only an FFN) left, T_none that of a model without
layers and T_00 that of a stack of n_00 layers with both modules dropped:

    t(kind, 0)    = (T_00 - T_none) / (2 · n_00)                   two residual additions and LayerNorms, shared evenly
    t(kind, size) = (T(kind, size) - T_none) / n - t(other, 0)

Where a file's layers with attention have an FFN in any case, the smallest one of the table, w columns, is in those of a
stack of attention, and t(ffn, w) takes the place of t(other, 0).

All this holds for every call of a workload, and so for their weighted sum. A model is timed as often on one call as on
any other, and its i-th timings of all calls make its i-th of the workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ziplm_deploy.engines import Timed
from ziplm_deploy.latency.grid import DENSE, DENSE_AS_SERVED, NO_LAYERS, Grid, cell_id
from ziplm_deploy.latency.statistics import (
    Floats,
    WorkloadTiming,
    bootstrap_medians,
    relative_standard_error,
    remove_drift,
    summarize_calls,
)
from ziplm_deploy.latency.table import Cell, PrunedSample
from ziplm_deploy.models.shape import ModuleId, ModuleKind

# A cell is also sure enough when its error, in every layer of the model, is this fraction of the whole latency.
NEGLIGIBLE = 0.0005
MIN_MS = 1e-4


@dataclass
class Samples:
    """Timings of all models in the order they were taken, and without the machine's speed changes."""

    weights: tuple[float, ...] = (1.0,)  # of the workload's calls
    order: list[Timed] = field(default_factory=list)  # model id and call of each sample
    raw_ms: list[float] = field(default_factory=list)
    of_calls: dict[str, Floats] = field(default_factory=dict)  # model id -> corrected milliseconds [calls, n]
    speeds: Floats = field(default_factory=lambda: np.ones(1))
    rounds: int = 0
    remeasured: int = 0

    def on_every_call(self, ids: Sequence[str]) -> list[Timed]:
        """Each of these models with every call of the workload."""
        return [(model_id, call) for model_id in ids for call in range(len(self.weights))]

    def add(self, order: Sequence[Timed], raw_ms: list[float]) -> None:
        """Append a round of timings, in which every model met every call, and correct all of them for the machine's
        speed changes anew."""
        self.order += order
        self.raw_ms += raw_ms
        numbers = {timed: number for number, timed in enumerate(sorted(set(self.order)))}
        labels = np.array([numbers[timed] for timed in self.order])
        corrected, self.speeds = remove_drift(labels, self.raw_ms)
        calls = range(len(self.weights))
        self.of_calls = {
            model_id: np.stack([corrected[labels == numbers[model_id, call]] for call in calls])
            for model_id in dict.fromkeys(model_id for model_id, _ in numbers)
        }

    @property
    def ms(self) -> dict[str, Floats]:
        """Corrected milliseconds [n] of the workload by model id."""
        return {model_id: np.asarray(self.weights) @ samples_ms for model_id, samples_ms in self.of_calls.items()}

    def timing(self, model_id: str) -> WorkloadTiming:
        """Summary of a model's timings."""
        return summarize_calls(self.of_calls[model_id], self.weights)


def unsure(samples: Samples, grid: Grid) -> list[str]:
    """Models whose median is neither precise by itself nor negligible in the whole model."""
    of_models = samples.ms
    whole_ms = of_models.get(DENSE_AS_SERVED, of_models[DENSE])
    negligible_ms = NEGLIGIBLE * float(np.median(whole_ms))
    found = []
    for model_id, ms in of_models.items():
        error = relative_standard_error(ms)
        precision = grid.profile.precision / 2 if model_id == DENSE else grid.profile.precision
        if error > precision and error * float(np.median(ms)) * grid.multiplicity(model_id) > negligible_ms:
            found.append(model_id)
    return found


def non_monotone(samples: Samples, grid: Grid) -> list[str]:
    """Neighbouring sizes of which the smaller one looks slower."""
    suspects, ms = [], samples.ms
    for kind, sizes in grid.cell_sizes.items():
        ids = [cell_id(kind, size) for size in sizes if cell_id(kind, size) in ms]
        medians = [float(np.median(ms[model_id])) for model_id in ids]
        for index in range(len(ids) - 1):
            if medians[index + 1] > medians[index]:
                suspects += ids[index : index + 2]
    return suspects


def cells_of(samples: Samples, grid: Grid) -> list[Cell]:
    """Every cell with its bootstrap interval, by the formulas above."""
    n_dropped = grid.depth("attention", 0)
    none, dropped = samples.of_calls[NO_LAYERS], samples.of_calls[cell_id("attention", 0)]  # [calls, n] each
    none_boot, dropped_boot = _draws(none, seed=1), _draws(dropped, seed=2)  # [calls, draws] each
    none_ms, dropped_ms = _medians(none), _medians(dropped)  # [calls, 1] each
    zero_ms, zero_boot = (dropped_ms - none_ms) / (2 * n_dropped), (dropped_boot - none_boot) / (2 * n_dropped)

    def without_zero(kind: ModuleKind, size: int) -> tuple[Floats, Floats]:
        """A layer of a cell's stack less a dropped module: milliseconds [calls, n], medians [calls, draws]."""
        ms, depth = samples.of_calls[cell_id(kind, size)], grid.depth(kind, size)
        return (ms - none_ms) / depth - zero_ms, (_draws(ms, seed=3 + size) - none_boot) / depth - zero_boot

    cells = []
    for kind, sizes in grid.cell_sizes.items():
        for size in sizes:
            if cell_id(kind, size) not in samples.of_calls:  # the engine refused it
                continue
            ms, boot = without_zero(kind, size)
            if grid.beside(kind, size):
                other_ms, other_boot = without_zero("ffn", grid.beside(kind, size))
                ms, boot = ms + zero_ms - _medians(other_ms), boot + zero_boot - other_boot
            # Differences of noisy medians can fall below zero in tiny models; time cannot.
            timing = summarize_calls(ms, samples.weights, boot, floor_ms=MIN_MS)
            cells.append(Cell(kind=kind, size=size, timing=timing))
    return cells


def _draws(samples_ms: Floats, seed: int) -> Floats:
    """Bootstrapped medians [calls, draws] of samples [calls, n]."""
    return np.stack([bootstrap_medians(row, seed) for row in samples_ms])


def _medians(samples_ms: Floats) -> Floats:
    return np.median(samples_ms, axis=1, keepdims=True)  # [calls, n] -> [calls, 1]


def wholes_of(samples: Samples, grid: Grid) -> list[PrunedSample]:
    """The whole models that ran, of cells that ran too."""
    known = samples.of_calls.keys()
    return [
        PrunedSample(sizes=sizes, timing=samples.timing(model_id))
        for model_id, sizes in grid.pruned_samples.items()
        if {model_id, *(cell_id(ModuleId.parse(name).kind, size) for name, size in sizes.items())} <= known
    ]


def noise_of(samples: Samples) -> dict[str, float]:
    """How the machine behaved: its speed changes, rounds, the least precise model, two halves of the dense one."""
    of_models = samples.ms
    dense = of_models[DENSE]
    slow, fast = np.quantile(samples.speeds, [0.9, 0.1])
    return {
        "speed_drift_p90_over_p10": float(slow / fast),
        "rounds": float(samples.rounds),
        "remeasured": float(samples.remeasured),
        "worst_relative_error": max(relative_standard_error(ms) for ms in of_models.values()),
        "dense_odd_over_even_rounds": float(np.median(dense[1::2]) / np.median(dense[::2])) if dense.size > 1 else 1.0,
    }
