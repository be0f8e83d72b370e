"""What a report is made from: facts about every member and file, as the stages left them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ziplm_deploy.baselines import BaselineRecord
from ziplm_deploy.compression.records import Int8Record
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.latency.record import BenchmarkRecord, FileTiming
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Recipe, Variant, file_label
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.recovery.self_data import SampledTexts
from ziplm_deploy.reporting.records import TextWindows
from ziplm_deploy.tasks.lengths import TokenLengths
from ziplm_deploy.tasks.record import Continuations
from ziplm_deploy.tasks.resampling import Comparison
from ziplm_deploy.tasks.retrieval_scores import RetrievalScores
from ziplm_deploy.tasks.uncertainty import FileUncertainty


@dataclass(frozen=True)
class FileFacts:
    """One file on one engine."""

    variant: Variant
    path: Path
    onnx_bytes: int
    gzip_bytes: int  # what a download weighs
    timing: FileTiming
    scores: dict[str, float]  # the primary metric first; empty: not evaluated, or not on this engine
    by_label: dict[str, float] = field(default_factory=dict)  # F1 of every class, or type of entity
    sparsity: SparsityRecord | None = None
    int8: Int8Record | None = None
    uncertainty: FileUncertainty | None = None  # of the scores; None: of files from before outcomes were kept
    baseline_gains: dict[str, Comparison] = field(default_factory=dict)  # primary score of a baseline less this file's


@dataclass(frozen=True)
class MemberFacts:
    """One model of the family; ``target`` and ``plan`` are None for the dense one."""

    name: str
    target: float | None
    plan: PruningPlan | None
    sizes: dict[str, int]  # heads or columns per module
    parameters: int
    files: list[FileFacts]  # the exported one first, each after those it is made from
    scores_before_training: dict[str, float] = field(default_factory=dict)
    training: TrainingRecord | None = None
    training_effect: Comparison | None = None  # on the primary metric of model.onnx
    corrections: int = 0  # how often the closed loop solved the target again
    refused_plans: int = 0  # how often it had to, because the engine could not run the file
    continuations: Continuations | None = None  # of causal language models
    speedup_in_loop: float | None = None  # as the closed loop measured it last

    def label(self, variant: Variant) -> str:
        return file_label(self.name, variant)


@dataclass(frozen=True)
class BaselineFacts:
    """What users get from the dense model without pruning, on its own engine."""

    name: str
    title: str
    record: BaselineRecord
    size_bytes: int
    timing: FileTiming
    scores: dict[str, float]  # the dense model's where it answers as that does
    uncertainty: FileUncertainty | None = None


@dataclass(frozen=True)
class GgufFacts:
    """The GGUF file of one model of the family, in llama.cpp."""

    member: str
    served_as: str  # name of the member's ONNX file in the benchmark, which its target is about
    file_type: str  # of its weights
    path: Path
    size_bytes: int
    timing: FileTiming
    scores: dict[str, float]
    uncertainty: FileUncertainty | None = None


@dataclass(frozen=True)
class FamilyFacts:
    """A whole run."""

    recipe: Recipe
    metric: str
    record: BenchmarkRecord
    table: LatencyTable
    members: list[MemberFacts]  # the dense one first
    notes: list[str]  # warnings that the stages left
    stage_seconds: dict[str, float]
    short: BenchmarkRecord | None = None  # of requests of the texts' median length, if that is much below seq_len
    lengths: dict[str, TokenLengths] = field(default_factory=dict)  # of the data sets' texts
    baselines: list[BaselineFacts] = field(default_factory=list)
    gguf: list[GgufFacts] = field(default_factory=list)  # that of the dense model first
    plain_pages: FileTiming | None = None  # of the dense model, where the environment asks for huge pages
    retrieval: RetrievalScores | None = None  # of embedding models, where the recipe has data for it
    windows: TextWindows | None = None  # that a causal language model was scored on
    sampled_texts: SampledTexts | None = None  # of the dense model, where they stand for data
    stage_versions: dict[str, dict[str, str]] = field(default_factory=dict)  # of the packages that made each stage
