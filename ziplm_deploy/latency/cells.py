"""Cells of a table from the timings of its models, and which timings are not sure enough yet.

With T the latency of a stack of ``depth`` layers that have only attention (or only an FFN) left, T_none that of a model
without layers and T_00 that of a stack of layers with both modules dropped:

    t(kind, 0)    = (T_00 - T_none) / (2 · depth)                  two residual additions and LayerNorms, shared evenly
    t(kind, size) = (T(kind, size) - T_none) / depth - t(other, 0)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ziplm_deploy.latency.grid import DENSE, DENSE_AS_SERVED, NO_LAYERS, Grid, cell_id
from ziplm_deploy.latency.statistics import (
    Floats,
    Timing,
    bootstrap_medians,
    interval,
    relative_standard_error,
    remove_drift,
    summarize,
)
from ziplm_deploy.latency.table import Cell, PrunedSample
from ziplm_deploy.models.shape import ModuleId

# A cell is also sure enough when its error, in every layer of the model, is this fraction of the whole latency.
NEGLIGIBLE = 0.0005
MIN_MS = 1e-4


@dataclass
class Samples:
    """Timings of all models in the order they were taken, and without the machine's speed changes."""

    order: list[str] = field(default_factory=list)  # model id of each sample
    raw_ms: list[float] = field(default_factory=list)
    ms: dict[str, Floats] = field(default_factory=dict)  # model id -> corrected milliseconds
    speeds: Floats = field(default_factory=lambda: np.ones(1))
    rounds: int = 0
    remeasured: int = 0

    def add(self, order: list[str], raw_ms: list[float]) -> None:
        """Append a round of timings and correct all of them for the machine's speed changes anew."""
        self.order += order
        self.raw_ms += raw_ms
        ids = np.asarray(self.order)
        labels = np.unique(ids, return_inverse=True)[1]
        corrected, self.speeds = remove_drift(labels, self.raw_ms)
        self.ms = {str(model_id): corrected[ids == model_id] for model_id in np.unique(ids)}


def unsure(samples: Samples, grid: Grid) -> list[str]:
    """Models whose median is neither precise by itself nor negligible in the whole model."""
    whole_ms = samples.ms.get(DENSE_AS_SERVED, samples.ms[DENSE])
    negligible_ms = NEGLIGIBLE * float(np.median(whole_ms))
    found = []
    for model_id, ms in samples.ms.items():
        error = relative_standard_error(ms)
        precision = grid.profile.precision / 2 if model_id == DENSE else grid.profile.precision
        if error > precision and error * float(np.median(ms)) * grid.multiplicity(model_id) > negligible_ms:
            found.append(model_id)
    return found


def non_monotone(samples: Samples, grid: Grid) -> list[str]:
    """Neighbouring sizes of which the smaller one looks slower."""
    suspects = []
    for kind, sizes in grid.cell_sizes.items():
        ids = [cell_id(kind, size) for size in sizes if cell_id(kind, size) in samples.ms]
        medians = [float(np.median(samples.ms[model_id])) for model_id in ids]
        for index in range(len(ids) - 1):
            if medians[index + 1] > medians[index]:
                suspects += ids[index : index + 2]
    return suspects


def cells_of(samples: Samples, grid: Grid) -> list[Cell]:
    """Every cell with its bootstrap interval, by the formulas above."""
    depth = grid.profile.stack_depth
    none, dropped = samples.ms[NO_LAYERS], samples.ms[cell_id("attention", 0)]
    none_boot, dropped_boot = bootstrap_medians(none, seed=1), bootstrap_medians(dropped, seed=2)
    none_ms, dropped_ms = float(np.median(none)), float(np.median(dropped))
    zero_ms, zero_boot = (dropped_ms - none_ms) / (2 * depth), (dropped_boot - none_boot) / (2 * depth)
    cells = []
    for kind, sizes in grid.cell_sizes.items():
        for size in sizes:
            if cell_id(kind, size) not in samples.ms:  # the engine refused it
                continue
            ms = samples.ms[cell_id(kind, size)]
            boot = (bootstrap_medians(ms, seed=3 + size) - none_boot) / depth - zero_boot
            cells.append(Cell(kind=kind, size=size, timing=_cell_timing((ms - none_ms) / depth - zero_ms, boot)))
    return cells


def wholes_of(samples: Samples, grid: Grid) -> list[PrunedSample]:
    """The whole models that ran, of cells that ran too."""
    return [
        PrunedSample(sizes=sizes, timing=summarize(samples.ms[model_id]))
        for model_id, sizes in grid.pruned_samples.items()
        if {model_id, *(cell_id(ModuleId.parse(name).kind, size) for name, size in sizes.items())} <= samples.ms.keys()
    ]


def _cell_timing(values_ms: Floats, boot_ms: Floats) -> Timing:
    low, high = interval(boot_ms)
    median, p90, p99 = np.quantile(values_ms, [0.5, 0.9, 0.99])
    milliseconds = {"median_ms": median, "low_ms": low, "high_ms": high, "p90_ms": p90, "p99_ms": p99}
    # Differences of noisy medians can fall below zero in tiny models; time cannot.
    return Timing(n=values_ms.size, **{name: max(float(value), MIN_MS) for name, value in milliseconds.items()})


def noise_of(samples: Samples) -> dict[str, float]:
    """How the machine behaved: its speed changes, rounds, the least precise model, two halves of the dense one."""
    dense = samples.ms[DENSE]
    slow, fast = np.quantile(samples.speeds, [0.9, 0.1])
    return {
        "speed_drift_p90_over_p10": float(slow / fast),
        "rounds": float(samples.rounds),
        "remeasured": float(samples.remeasured),
        "worst_relative_error": max(relative_standard_error(ms) for ms in samples.ms.values()),
        "dense_odd_over_even_rounds": float(np.median(dense[1::2]) / np.median(dense[::2])) if dense.size > 1 else 1.0,
    }
