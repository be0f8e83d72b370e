"""Typed, versioned files between stages: schema version, atomic save, checked load.

JSON artifacts are pydantic models. A file is written whole or not at all (temporary file, fsync, rename).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from ziplm_deploy.config import Environment, Variant
from ziplm_deploy.errors import CorruptArtifactError, StorageError
from ziplm_deploy.sum_correction import SumCorrection

ModuleKind = Literal["attention", "ffn"]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on any failure remove it.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    # Named before it exists: an interrupt while it is made must find the name, or the file stays.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another output_dir"
        ) from error
    finally:
        with contextlib.suppress(NotADirectoryError):  # then nothing was made, and the error above says so
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file that then becomes ``path``, atomically."""
    with atomic_path(path) as temporary:
        write(temporary)


class Artifact(BaseModel):
    """A JSON file with ``kind`` and ``schema_version``; both are checked when it is loaded."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int] = 1

    def save(self, path: Path) -> None:
        head = {"kind": self.KIND, "schema_version": self.SCHEMA_VERSION}
        write_text(path, json.dumps({**head, **self.model_dump(mode="json")}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file of this kind.

        Raises:
            CorruptArtifactError: missing, not JSON, of another kind or schema version, or fields are wrong.
        """
        what = cls.KIND.replace("_", " ")
        try:
            raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(
                f"expected a {what} in {path}, found: {error}; delete it and run the same command again"
            ) from error
        raw = raw if isinstance(raw, dict) else {}
        kind, version = raw.pop("kind", None), raw.pop("schema_version", None)
        if kind != cls.KIND or version != cls.SCHEMA_VERSION:
            raise CorruptArtifactError(
                f"expected a {what} of schema {cls.SCHEMA_VERSION} in {path}, found kind {kind!r}, schema {version!r}; "
                "make it again with this version of ziplm-deploy"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise CorruptArtifactError(f"expected a {what} in {path}, found wrong fields: {error}") from error


class MachineInfo(BaseModel):
    """What a measurement depends on. ``fingerprint`` compares only what changes latency."""

    cpu_model: str
    isa_flags: tuple[str, ...]  # the ones that matter for inference: avx2, avx512f, avx512_vnni, amx_int8 …
    logical_cores: int
    usable_cores: int  # affinity ∩ cgroup quota
    memory_bytes: int
    operating_system: str

    @property
    def fingerprint(self) -> str:
        return f"{self.cpu_model} | {' '.join(self.isa_flags)}"


class Timing(BaseModel):
    """Summary of repeated timings of one thing, in milliseconds."""

    median_ms: float
    low_ms: float  # bootstrap 95 % interval of the median
    high_ms: float
    p90_ms: float
    p99_ms: float
    n: int


class ModelShape(BaseModel):
    """The dimensions that decide what a cell costs."""

    model_type: str
    n_layers: int
    hidden_size: int
    n_heads: int
    head_dim: int
    intermediate_size: int


class Cell(BaseModel):
    """Latency of one sub-block: attention with ``size`` heads or an FFN of width ``size``; 0 = dropped."""

    kind: ModuleKind
    size: int
    timing: Timing


class WholeModel(BaseModel):
    """Latency of a whole model with these sizes, ``{"0.attention": heads, "0.ffn": width, …}``."""

    sizes: dict[str, int]
    timing: Timing


class LatencyTable(Artifact):
    """Measured milliseconds of every sub-block shape, the base and the dense model, on one machine.

    Cells and base are in the form of ``variant`` on ``engine``: their sum predicts a member, corrected by what some
    whole models took. ``dense`` is what speedups are over: the float32 model on ``baseline_engine``.
    """

    KIND: ClassVar[str] = "latency_table"

    machine: MachineInfo
    engine: str
    engine_version: str
    environment: Environment
    shape: ModelShape
    graph: str  # what else is in the graph: model class, activation, vocabulary or image size, outputs
    variant: Variant = "fp32"
    form: str = ""  # how the variant was made, in words: two tables of a variant may differ in sparsity
    baseline_engine: str = ""  # files from before it was recorded: ``engine``
    baseline_engine_version: str = ""
    shapes: Literal["dynamic", "static"]
    opset: int
    stack_depth: int
    base: Timing  # embeddings + head: the model with no layers
    dense: Timing  # the dense float32 model end to end on the baseline engine, same run
    unpruned: Timing | None = None  # the dense model in the form of the cells, on their engine; None: it is ``dense``
    cells: list[Cell]
    wholes: list[WholeModel] = Field(default_factory=list)  # in the form of the cells; none: sums are not corrected
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
    def _wholes_are_of_cells(self) -> Self:
        known = {f"{cell.kind} {cell.size}" for cell in self.cells}
        for whole in self.wholes:
            unknown = {f"{name.split('.')[-1]} {size}" for name, size in whole.sizes.items()} - known
            if unknown or whole.timing.median_ms <= 0:
                raise ValueError(f"expected timed whole models of measured cells, found others: {sorted(unknown)}")
        return self

    def latency_ms(self, kind: ModuleKind, size: int) -> float:
        """Milliseconds of one sub-block; raises ``KeyError`` for a size that was not measured."""
        return self._by_size()[kind, size]

    def sizes(self, kind: ModuleKind) -> list[int]:
        """Measured sizes of a kind, ascending."""
        return sorted(cell.size for cell in self.cells if cell.kind == kind)

    def _by_size(self) -> dict[tuple[str, int], float]:
        return {(cell.kind, cell.size): cell.timing.median_ms for cell in self.cells}

    def sum_ms(self, sizes: dict[str, int]) -> float:
        """Base and cells of a plan ``{"0.attention": heads, "0.ffn": width, …}`` added up."""
        lookup = self._by_size()
        return self.base.median_ms + sum(lookup[name.split(".")[1], size] for name, size in sizes.items())

    def sum_dense_ms(self) -> float:
        """The same for the dense shapes in the table's form: near ``(unpruned or dense).median_ms``."""
        shape = self.shape
        layer_ms = self.latency_ms("attention", shape.n_heads) + self.latency_ms("ffn", shape.intermediate_size)
        return self.base.median_ms + shape.n_layers * layer_ms

    def predict_ms(self, sizes: dict[str, int]) -> float:
        """Predicted end-to-end latency of a plan."""
        return self._correction().whole_ms(self.sum_ms(sizes))

    def predict_speedup(self, modules_ms: float) -> float:
        """Predicted speedup of a model whose modules sum up to this many milliseconds."""
        return self.dense.median_ms / self._correction().whole_ms(self.base.median_ms + modules_ms)

    def modules_budget_ms(self, speedup: float) -> float:
        """What all modules may sum up to for a predicted speedup; not positive if the base alone takes too long."""
        return self._correction().sum_ms(self.dense.median_ms / speedup) - self.base.median_ms

    def _correction(self) -> SumCorrection:
        if not self.wholes:
            return SumCorrection([])
        full = (self.sum_dense_ms(), (self.unpruned or self.dense).median_ms)
        base = (self.base.median_ms, self.base.median_ms)
        return SumCorrection([base, full, *((self.sum_ms(w.sizes), w.timing.median_ms) for w in self.wholes)])


class PruningPlan(Artifact):
    """Which level every module gets: heads for attention, columns for FFN, keyed ``LAYER.KIND``."""

    KIND: ClassVar[str] = "pruning_plan"

    speedup_target: float
    budget_ms: float  # for Σ modules, after the closed loop's corrections
    method: str
    sizes: dict[str, int]
    predicted_ms: float
    predicted_speedup: float
    search_loss: float | None = None  # distance to the dense model on the re-ranking examples; None: not searched
    seed_losses: dict[str, float] = Field(default_factory=dict)  # plan without search, uniform, … same examples
    evaluations: int = 0


class TrainingRecord(Artifact):
    """What one training took, and how its loss fell."""

    KIND: ClassVar[str] = "training_record"

    device: str
    steps: int
    examples_per_step: int  # of all processes together
    seconds: float  # of the steps that the last process ran: less than all where a killed training was resumed
    samples_per_second: float
    losses: list[tuple[int, float]]  # (step, mean training loss since the entry before)


class VariantResult(BaseModel):
    """One ONNX file in an interleaved benchmark."""

    name: str
    path: str
    engine: str = ""  # files from before it was recorded: the record's
    engine_version: str = ""
    latency: Timing
    p50_ms: float
    throughput_per_second: float
    peak_memory_bytes: int
    speedup: float  # over the baseline of the same run
    speedup_low: float
    speedup_high: float
    samples_ms: list[float]


class BenchmarkRecord(Artifact):
    """End-to-end timings of several ONNX files, interleaved in one run, with an A/A line."""

    KIND: ClassVar[str] = "benchmark_record"

    machine: MachineInfo
    engine: str  # where the members serve; a variant may have run on another one
    engine_version: str
    environment: Environment
    baseline: str
    aa_ratio: float  # the baseline against itself in the same run
    aa_low: float
    aa_high: float
    rounds_of_processes: list[int] = Field(
        default_factory=list
    )  # one entry for each process a file had; old files: one
    variants: list[VariantResult]
    date: str
    seconds: float

    @model_validator(mode="after")
    def _one_engine_without_others(self) -> Self:
        own = {"engine": self.engine, "engine_version": self.engine_version}
        self.variants = [result if result.engine else result.model_copy(update=own) for result in self.variants]
        return self

    def variant(self, name: str) -> VariantResult:
        return next(result for result in self.variants if result.name == name)


class FileReport(BaseModel):
    """One ONNX file of a member, as measured and evaluated on the engine that runs it."""

    variant: Variant
    file: str  # in the member's folder
    engine: str
    measured_speedup: float  # over the dense float32 model of the same run
    measured_low: float  # 95 % interval
    measured_high: float
    p50_ms: float
    p99_ms: float
    throughput_per_second: float
    peak_memory_bytes: int
    onnx_bytes: int
    gzip_bytes: int  # what a download weighs
    accuracy: dict[str, float]  # empty: not evaluated, or not on this engine
    facts: dict[str, str] = Field(default_factory=dict)  # how it was made: sparsity, INT8 method, what stayed float32
    recommended: bool
    reason: str = ""  # why it is not recommended


class MemberReport(BaseModel):
    """One model of the family: what was asked, predicted and measured, and what it cost."""

    name: str  # "dense", "2x" …
    folder: str
    speedup_target: float | None  # None for the dense model
    predicted_speedup: float | None
    measured_speedup: float
    measured_low: float  # 95 % interval
    measured_high: float
    p50_ms: float
    p99_ms: float
    throughput_per_second: float
    peak_memory_bytes: int
    parameters: int
    onnx_bytes: int
    variant: Variant = "fp32"  # the file that the target is about, and all figures here
    files: list[FileReport] = Field(default_factory=list)  # every file, this one too
    accuracy: dict[str, float]  # of the ONNX file; the task's primary metric first; empty without evaluation data
    accuracy_before_training: dict[str, float] = Field(default_factory=dict)  # of the ONNX file as pruned
    training: TrainingRecord | None = None
    sizes: dict[str, int]  # heads or columns per module
    search_loss: float | None = None
    seed_losses: dict[str, float] = Field(default_factory=dict)
    corrections: int = 0  # how often the closed loop solved this target again
    verdict: Literal["baseline", "reached", "missed", "faster than asked"]
    reason: str = ""  # why a target was missed or overshot

    @property
    def exported_accuracy(self) -> dict[str, float]:
        """Scores of ``model.onnx``, the only ones that those before training compare with; empty if it was not run."""
        if self.variant == "fp32":
            return self.accuracy
        return next((file.accuracy for file in self.files if file.variant == "fp32"), {})


class FamilyReport(Artifact):
    """What ``ziplm-deploy run`` ends with: every member beside the dense model of the same run."""

    KIND: ClassVar[str] = "family_report"

    name: str
    model: str
    task: str
    metric: str
    method: str
    recovery: str = "none"  # mode of the training after pruning
    machine: MachineInfo
    engine: str  # where the members serve
    engine_version: str
    baseline_engine: str = ""  # of the dense model that speedups are over; empty: from before it was recorded
    baseline_engine_version: str = ""
    environment: Environment
    members: list[MemberReport]
    aa_ratio: float
    aa_low: float
    aa_high: float
    notes: list[str]  # warnings of the run, e.g. few calibration tokens
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    date: str
