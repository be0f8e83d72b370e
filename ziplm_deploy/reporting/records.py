"""The report of a family as data: its members, their files, and what was measured of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from ziplm_deploy.artifacts import Artifact, Fields
from ziplm_deploy.latency.record import CallFigures, FileTiming, from_schema_1, of_one_call
from ziplm_deploy.latency.statistics import Milliseconds, Ratio, Speedup
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.recipe import Environment, GeneratedConfig, Variant
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.tasks.lengths import TokenLengths
from ziplm_deploy.tasks.resampling import Comparison, Decision
from ziplm_deploy.tasks.retrieval_scores import RetrievalScores


class Timed(BaseModel):
    """Figures of one file in the benchmark, on its engine."""

    engine: str
    measured_speedup: Speedup  # over the dense float32 model of the same run
    measured_low: Speedup  # 95 % interval
    measured_high: Speedup
    p50_ms: Milliseconds
    p99_ms: Milliseconds
    throughput_per_second: float = Field(gt=0, allow_inf_nan=False)
    peak_memory_bytes: int
    huge_page_bytes: int | None = None  # what of its memory lay in huge pages; None: not known
    # Where the workload has several; all the others are of their weighted sum.
    calls: list[CallFigures] = Field(default_factory=list, exclude_if=lambda calls: not calls)

    @property
    def ratio(self) -> Ratio:
        """Speedup over the dense float32 model, with its interval."""
        return Ratio(self.measured_speedup, self.measured_low, self.measured_high)

    @staticmethod
    def figures(timing: FileTiming) -> dict[str, Any]:
        """Fields of this class from a file's timing."""
        return {
            "engine": timing.engine,
            "measured_speedup": timing.speedup,
            "measured_low": timing.speedup_low,
            "measured_high": timing.speedup_high,
            "p50_ms": timing.p50_ms,
            "p99_ms": timing.latency.p99_ms,
            "throughput_per_second": timing.throughput_per_second,
            "peak_memory_bytes": timing.peak_memory_bytes,
            "huge_page_bytes": timing.huge_page_bytes,
            "calls": [CallFigures(**call.model_dump(exclude={"samples_ms"})) for call in timing.calls],
        }


class FileReport(Timed):
    """One file of a member, as measured and evaluated on the engine that runs it."""

    variant: Variant
    file: str  # in the member's folder
    onnx_bytes: int  # of the file, also where it is GGUF
    gzip_bytes: int  # what a download weighs
    accuracy: dict[str, float]  # empty: not evaluated, or not on this engine
    over_torch: Ratio | None = None  # speedup over the dense model in torch, where that was measured
    beaten_by: list[str] = Field(default_factory=list)  # baselines that are faster and score higher, beyond intervals
    undecided_against: list[str] = Field(default_factory=list)  # baselines that it is neither behind nor ahead of
    by_label: dict[str, float] = Field(default_factory=dict)  # F1 of every class, or type of entity
    accuracy_intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)  # 95 %, by metric
    of_dense: dict[str, Comparison] = Field(default_factory=dict)  # by metric; empty: dense, or of older files
    budget: Decision | None = None  # does it keep what compress.int8.max_loss asks of an INT8 file?
    of_source: Comparison | None = None  # of an INT8 file, on the examples that its accuracy was not tuned on
    facts: dict[str, str] = Field(default_factory=dict)  # how it was made: sparsity, INT8 method, what stayed float32
    recommended: bool
    reason: str = ""  # why it is not recommended


class MemberReport(BaseModel):
    """One model of the family: what was asked, predicted and measured, and what it cost."""

    name: str  # "dense", "2x" …
    folder: str
    speedup_target: float | None  # None for the dense model
    predicted_speedup: float | None = None
    parameters: int
    served: FileReport  # the file that the target is about
    files: list[FileReport] = Field(default_factory=list)  # every file, this one too
    continued: dict[str, str] = Field(default_factory=dict)  # texts by prompt; of causal language models
    accuracy_before_training: dict[str, float] = Field(default_factory=dict)  # of the ONNX file as pruned
    short_speedup: Ratio | None = None  # on requests of ``FamilyReport.short_tokens``
    training: TrainingRecord | None = None
    training_effect: Comparison | None = None  # on the primary metric of model.onnx
    sizes: dict[str, int]  # heads or columns per module
    search_loss: float | None = None
    seed_losses: dict[str, float] = Field(default_factory=dict)
    exchanged_fraction: float | None = Field(None, exclude_if=lambda fraction: fraction is None)  # see PruningPlan
    corrections: int = 0  # how often the closed loop solved this target again
    verdict: Literal["baseline", "reached", "missed", "faster than asked", "undecided"]
    reason: str = ""  # why a target was missed or overshot

    @model_validator(mode="before")
    @classmethod
    def _file_of_its_own(cls, raw: Any) -> Any:
        """Rows of reports of schema 1 held the figures of the served file among those of the member."""
        if not isinstance(raw, dict) or "served" in raw or "measured_speedup" not in raw:
            return raw
        row = dict(raw)
        figures = {
            name: row.pop(name) for name in FileReport.model_fields if name in row and name not in cls.model_fields
        }
        figures = {"variant": Variant.FP32, "engine": "", "gzip_bytes": 0, "recommended": True} | figures
        figures["file"] = Variant(figures["variant"]).file_name
        listed = [file for file in row.get("files", []) if file["variant"] == figures["variant"]]
        return {**row, "served": listed[0] if listed else figures}

    @property
    def exported_accuracy(self) -> dict[str, float]:
        """Scores of the exported file, the only ones that those before training compare with; empty if it was not
        run."""
        if self.served.variant.is_exported:
            return self.served.accuracy
        return next((file.accuracy for file in self.files if file.variant.is_exported), {})


class BaselineReport(Timed):
    """What users get from the dense model without pruning, timed in the same run and scored on the same rows."""

    name: str  # in the recipe
    title: str
    tool: str  # that made it, with its version
    settings: str
    engine_version: str
    size_bytes: int
    over_torch: Ratio | None = None  # speedup over the dense model in torch, where that was measured
    accuracy: dict[str, float]  # empty: not evaluated
    accuracy_intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)  # 95 %, by metric
    of_dense: dict[str, Comparison] = Field(default_factory=dict)  # by metric; empty where it answers as dense does


class GgufReport(Timed):
    """The GGUF file of a member in llama.cpp, timed in the same run and scored on the same rows as its ONNX files."""

    name: str  # in the benchmark: "dense Q8_0" …
    member: str
    file: str  # in the member's folder
    file_type: str  # of its weights
    size_bytes: int
    engine_version: str
    over_dense: Ratio | None = None  # speedup over the dense model's GGUF file; None for that itself
    over_onnx: Ratio  # speedup over the member's ONNX file that its target is about
    accuracy: dict[str, float]  # empty: not evaluated
    accuracy_intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)  # 95 %, by metric
    of_dense: dict[str, Comparison] = Field(default_factory=dict)  # by metric; over the dense ONNX file
    of_source: Comparison | None = None  # primary metric over the member's model.onnx


class SampledText(BaseModel):
    """Text that the dense model wrote, in place of data."""

    n_texts: int
    n_tokens: int
    seconds: float  # that sampling took
    serves: list[Literal["calibration", "training"]]
    seed: int
    settings: GeneratedConfig


class TextWindows(BaseModel):
    """Windows of text that perplexities are of, which depend on both figures."""

    context: int  # tokens of a window
    stride: int  # tokens from one to the next


class FamilyReport(Artifact):
    """What ``ziplm-deploy run`` ends with: every member beside the dense model of the same run."""

    KIND: ClassVar[str] = "family_report"
    SCHEMA_VERSION: ClassVar[int] = 3
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {1: from_schema_1, 2: of_one_call}

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
    baselines: list[BaselineReport] = Field(default_factory=list)
    gguf: list[GgufReport] = Field(default_factory=list, exclude_if=lambda files: not files)  # that of dense first
    # the dense model without huge pages, where the environment asks for them
    plain_pages: Timed | None = Field(None, exclude_if=lambda timed: timed is None)
    aa_ratio: Speedup
    aa_low: Speedup
    aa_high: Speedup
    tolerance: float = 0.02  # fraction by which a target may be missed, and the noise that verdicts allow
    notes: list[str]  # warnings of the run, e.g. few calibration tokens
    # where data was sampled from the dense model
    sampled_text: SampledText | None = Field(None, exclude_if=lambda sampled: sampled is None)
    windows: TextWindows | None = Field(None, exclude_if=lambda windows: windows is None)  # of causal language models
    short_tokens: int | None = None  # median length of the evaluation texts, if it is much below the workload's
    short_itself: Ratio | None = None  # the baseline over itself on requests of that length
    lengths: dict[str, TokenLengths] = Field(
        default_factory=dict
    )  # of the texts by data set; empty: images, or unknown
    retrieval: RetrievalScores | None = None  # by file; of embedding models, where there was data to search
    stage_seconds: dict[str, float]
    versions: dict[str, str]  # that the latencies were measured with
    # of stages that were made with others: stage -> package -> version
    other_versions: dict[str, dict[str, str]] = Field(default_factory=dict)
    date: str

    @property
    def itself(self) -> Ratio:
        """The baseline over itself in the benchmark of this report."""
        return Ratio(self.aa_ratio, self.aa_low, self.aa_high)
