"""What a benchmark leaves behind: the timings of its files, and on what, with what and how they were taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, Field, model_validator
from typing_extensions import Self

from ziplm_deploy.artifacts import Artifact, Fields
from ziplm_deploy.documents import shown
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.statistics import Milliseconds, Ratio, Speedup, Timing, process_ratio
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.recipe import Environment, with_nested_workload


def from_schema_1(fields: Fields) -> Fields:
    """Fields of schema 2 from those of schema 1, in which batch size and tokens lay flat in ``environment``.

    Raises:
        ValueError: there is no such environment.
    """
    environment = fields.get("environment")
    if not isinstance(environment, dict) or "workload" in environment:
        raise ValueError(f"expected a flat environment in a file of schema 1, found {environment!r}")
    return {**fields, "environment": with_nested_workload(environment)}


def of_one_call(fields: Fields) -> Fields:
    """Fields of schema 3 from those of schema 2, in which a workload was one call: they have stayed the same.

    Raises:
        ValueError: its workload is another one.
    """
    workload = fields["environment"]["workload"]
    if "lengths" in workload:
        raise ValueError(f"expected a workload of one call in a file of schema 2, found {shown(workload)}")
    return fields


class CallFigures(BaseModel):
    """One of several calls that a file was timed on, with its speedup over the baseline on that call."""

    batch_size: int
    seq_len: int
    weight: float = Field(gt=0, allow_inf_nan=False)
    cache_length: int | None = Field(None, ge=0, exclude_if=lambda length: length is None)
    p50_ms: Milliseconds
    p99_ms: Milliseconds
    speedup: Speedup
    speedup_low: Speedup
    speedup_high: Speedup

    @property
    def ratio(self) -> Ratio:
        """Speedup with its interval."""
        return Ratio(self.speedup, self.speedup_low, self.speedup_high)


class CallTiming(CallFigures):
    """A call with its samples, of the same runs as the file's."""

    samples_ms: list[Milliseconds]


class FileTiming(BaseModel):
    """One ONNX file in an interleaved benchmark. Its milliseconds are those of the workload, the weighted sum of its
    calls, which were timed in the same rounds."""

    name: str
    path: str
    engine: str = ""  # files from before it was recorded: the record's
    engine_version: str = ""
    latency: Timing
    p50_ms: Milliseconds
    throughput_per_second: float = Field(gt=0, allow_inf_nan=False)
    peak_memory_bytes: int = Field(ge=0)
    # of its last process, at its end; None: the system does not tell, or files from before it was recorded
    huge_page_bytes: int | None = Field(None, ge=0)
    speedup: Speedup  # over the baseline of the same run
    speedup_low: Speedup
    speedup_high: Speedup
    samples_ms: list[Milliseconds]
    calls: list[CallTiming] = Field(default_factory=list, exclude_if=lambda calls: not calls)  # none: there is but one

    @property
    def ratio(self) -> Ratio:
        """Speedup with its interval."""
        return Ratio(self.speedup, self.speedup_low, self.speedup_high)


class BenchmarkRecord(Artifact):
    """End-to-end timings of several ONNX files, interleaved in one run, with an A/A line."""

    KIND: ClassVar[str] = "benchmark_record"
    SCHEMA_VERSION: ClassVar[int] = 3
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {1: from_schema_1, 2: of_one_call}

    machine: MachineInfo
    engine: str  # where the members serve; a variant may have run on another one
    engine_version: str
    environment: Environment
    baseline: str
    aa_ratio: Speedup  # the baseline against itself in the same run
    aa_low: Speedup
    aa_high: Speedup
    tolerance: float = 0.02  # that it was to decide about, as a fraction
    rounds_of_processes: list[int] = Field(default_factory=list)  # of each process a file had; old files: none
    variants: list[FileTiming]
    date: str
    seconds: float

    @model_validator(mode="after")
    def _one_engine_without_others(self) -> Self:
        own = {"engine": self.engine, "engine_version": self.engine_version}
        self.variants = [result if result.engine else result.model_copy(update=own) for result in self.variants]
        return self

    @property
    def itself(self) -> Ratio:
        """The baseline over itself: its floor is the noise of the whole benchmark."""
        return Ratio(self.aa_ratio, self.aa_low, self.aa_high)

    def ratio_between(self, name: str, other: str) -> Ratio:
        """How many times as fast a file is as another one, within the rounds that they share.

        Raises:
            CorruptArtifactError: one of them is missing, or it is not known which process a sample is of.
        """
        timings = {timing.name: timing.samples_ms for timing in self.variants}
        processes = np.repeat(np.arange(len(self.rounds_of_processes)), self.rounds_of_processes)
        runs, odd = divmod(len(timings[self.baseline]), max(1, processes.size)) if self.baseline in timings else (0, 0)
        found = [timings.get(each, []) for each in (other, name)]
        n_rounds = min(map(len, found)) // max(1, runs)
        if odd or not runs or not n_rounds or any(len(samples_ms) % runs for samples_ms in found):
            raise CorruptArtifactError(
                f"expected samples of {name} and {other} in rounds of the benchmark, of which it has {processes.size}, "
                "found others; run ziplm-deploy benchmark again"
            )
        others, own = (np.median(np.reshape(ms[: n_rounds * runs], (n_rounds, runs)), axis=1).tolist() for ms in found)
        return process_ratio(others, own, processes[:n_rounds].tolist())

    def variant(self, name: str) -> FileTiming:
        return next(result for result in self.variants if result.name == name)
