"""The latency table: what every sub-block of a model costs on one machine, and what whole models are predicted from it.

:mod:`ziplm_deploy.latency.profile` measures one. A prediction is the sum of a plan's cells and the base, corrected by
:mod:`ziplm_deploy.latency.correction`. Every timing is of the workload, the weighted sum of its calls, and holds that
of each call where there are several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator
from typing_extensions import Self

from ziplm_deploy.artifacts import Artifact, Fields
from ziplm_deploy.documents import shown
from ziplm_deploy.latency.correction import REFERENCE_ERROR, WHOLE_ERROR, SumCorrection
from ziplm_deploy.latency.record import from_schema_1, of_one_call
from ziplm_deploy.latency.statistics import WorkloadTiming
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.models.shape import MODULE_KINDS, ModelShape, ModuleId, ModuleKind
from ziplm_deploy.recipe import Environment, Variant


class Cell(BaseModel):
    """Latency of one sub-block: attention with ``size`` heads or an FFN of width ``size``; 0 = dropped."""

    kind: ModuleKind
    size: int = Field(ge=0)
    timing: WorkloadTiming


class PrunedSample(BaseModel):
    """Latency of a whole model with these sizes, ``{"0.attention": heads, "0.ffn": width, …}``."""

    sizes: dict[str, int]
    timing: WorkloadTiming


class LatencyTable(Artifact):
    """Measured milliseconds of every sub-block shape, the base and the dense model, on one machine.

    Cells and base are files of ``variant`` on ``engine``: their sum predicts a member, corrected by what some
    whole models took. ``dense`` is what speedups are over: the float32 model on ``baseline_engine``, or in llama.cpp
    the model with the weights that its members have.
    """

    KIND: ClassVar[str] = "latency_table"
    SCHEMA_VERSION: ClassVar[int] = 3
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {1: from_schema_1, 2: of_one_call}

    machine: MachineInfo
    engine: str
    engine_version: str
    environment: Environment
    shape: ModelShape
    graph: str  # what else is in the graph: model class, activation, vocabulary or image size, outputs
    variant: Variant = Variant.FP32
    form: str = ""  # the treatment in words: two tables of a variant may differ in sparsity, or in types of weights
    baseline_engine: str = ""  # files from before it was recorded: ``engine``
    baseline_engine_version: str = ""
    shapes: Literal["dynamic", "static"]
    opset: int
    stack_depth: int = Field(ge=1)
    base: WorkloadTiming  # embeddings + head: the model with no layers
    dense: WorkloadTiming  # the dense float32 model end to end on the baseline engine, same run
    # The dense model, treated as the cells are, on their engine; None: it is ``dense``.
    unpruned: WorkloadTiming | None = None
    cells: list[Cell]
    wholes: list[PrunedSample] = Field(default_factory=list)  # treated as the cells; none: sums are not corrected
    refused: dict[str, str] = Field(default_factory=dict)  # cells that the engine cannot run, and what it said
    date: str
    measuring_seconds: float
    total_seconds: float
    noise: dict[str, float] = Field(default_factory=dict)  # e.g. aa_ratio, rounds, remeasured

    @model_validator(mode="after")
    def _one_engine_without_another(self) -> Self:
        if not self.baseline_engine:
            self.baseline_engine, self.baseline_engine_version = self.engine, self.engine_version
        return self

    @model_validator(mode="after")
    def _cells_are_of_the_shape(self) -> Self:
        full = {"attention": self.shape.n_heads, "ffn": self.shape.intermediate_size}
        counts = Counter((cell.kind, cell.size) for cell in self.cells)
        wrong = sorted(cell for cell, count in counts.items() if cell[1] > full[cell[0]] or count > 1)
        if wrong:
            raise ValueError(f"expected distinct cells up to {full}, found double or larger ones: {shown(wrong)}")
        return self

    @model_validator(mode="after")
    def _wholes_are_of_cells(self) -> Self:
        known = {(cell.kind, cell.size) for cell in self.cells}
        for whole in self.wholes:
            modules = {ModuleId.parse(name): size for name, size in whole.sizes.items()}
            unknown = {(module.kind, size) for module, size in modules.items()} - known
            if unknown or any(module.layer >= self.shape.n_layers for module in modules):
                raise ValueError(f"expected whole models of measured cells, found others: {shown(whole.sizes)}")
        return self

    @model_validator(mode="after")
    def _timings_are_of_the_calls(self) -> Self:
        weights = self.environment.workload.weights if self.environment.workload.has_several else ()
        references = [timing for timing in (self.base, self.dense, self.unpruned) if timing is not None]
        parts = [*(cell.timing for cell in self.cells), *(whole.timing for whole in self.wholes)]
        for timing in (*references, *parts):
            if len(timing.of_calls) != len(weights):
                raise ValueError(
                    f"expected a timing of each of {len(weights) or 'one'} call(s), found {len(timing.of_calls)}"
                )
            total = sum(weight * each.median_ms for weight, each in zip(weights, timing.of_calls, strict=True))
            if weights and not math.isclose(total, timing.median_ms, rel_tol=1e-6):
                raise ValueError(
                    f"expected the weighted sum of the calls, {total:.6g} ms, found {timing.median_ms:.6g}"
                )
        return self

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What content keys depend on: all fields, the environment flat as in schema 1, so that old runs stay valid."""
        return {**self.model_dump(mode="json"), "environment": self.environment.fingerprint}

    def latency_ms(self, kind: ModuleKind, size: int) -> float:
        """Milliseconds of one sub-block; raises ``KeyError`` for a size that was not measured."""
        return self._by_size(None)[kind, size]

    def sizes(self, kind: ModuleKind) -> list[int]:
        """Measured sizes of a kind, ascending."""
        return sorted(cell.size for cell in self.cells if cell.kind == kind)

    def _by_size(self, call: int | None) -> dict[tuple[str, int], float]:
        return {(cell.kind, cell.size): cell.timing.median_ms_of(call) for cell in self.cells}

    def sum_ms(self, sizes: dict[str, int], call: int | None = None) -> float:
        """Base and cells of a plan ``{"0.attention": heads, "0.ffn": width, …}`` added up; ``call`` as in
        :meth:`predict_ms`."""
        lookup = self._by_size(call)
        parts = (lookup[ModuleId.parse(name).kind, size] for name, size in sizes.items())
        return self.base.median_ms_of(call) + sum(parts)

    def sum_dense_ms(self, call: int | None = None) -> float:
        """Base and cells of the dense shapes added up: near ``(unpruned or dense).median_ms``."""
        shape, lookup = self.shape, self._by_size(call)
        layer_ms = lookup["attention", shape.n_heads] + lookup["ffn", shape.intermediate_size]
        return self.base.median_ms_of(call) + shape.n_layers * layer_ms

    def predict_ms(self, sizes: dict[str, int], call: int | None = None) -> float:
        """Predicted end-to-end latency of a plan: that expected of the workload, or that of one of its calls.

        ``call``: its place in ``environment.workload.calls``.
        """
        return self._correction(call).whole_ms(self.sum_ms(sizes, call))

    def predict_speedup(self, modules_ms: float) -> float:
        """Predicted speedup of a model whose modules sum up to this many milliseconds."""
        return self.dense.median_ms / self._correction().whole_ms(self.base.median_ms + modules_ms)

    def largest_speedup(self) -> float:
        """Predicted speedup if every module is as fast as any measured size of its kind: mostly, if all are dropped."""
        fastest_ms = sum(min(self.latency_ms(kind, size) for size in self.sizes(kind)) for kind in MODULE_KINDS)
        return self.predict_speedup(self.shape.n_layers * fastest_ms)

    def modules_budget_ms(self, speedup: float) -> float:
        """What all modules may sum up to for a predicted speedup; not positive if the base alone takes too long."""
        return self._correction().sum_ms(self.dense.median_ms / speedup) - self.base.median_ms

    def _correction(self, call: int | None = None) -> SumCorrection:
        if not self.wholes:
            return SumCorrection([])
        base_ms = self.base.median_ms_of(call)
        full = (self.sum_dense_ms(call), (self.unpruned or self.dense).median_ms_of(call), REFERENCE_ERROR)
        wholes = [
            (self.sum_ms(whole.sizes, call), whole.timing.median_ms_of(call), WHOLE_ERROR) for whole in self.wholes
        ]
        return SumCorrection([(base_ms, base_ms, REFERENCE_ERROR), full, *wholes])
