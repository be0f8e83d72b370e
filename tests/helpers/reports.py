"""Artifacts made by hand, for tests of files, reports and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

from ziplm_deploy.artifacts import file_hash
from ziplm_deploy.baselines import BaselineScores
from ziplm_deploy.compression.records import Int8Record
from ziplm_deploy.latency.record import BenchmarkRecord, FileTiming
from ziplm_deploy.latency.statistics import Timing, WorkloadTiming
from ziplm_deploy.latency.table import Cell, LatencyTable
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.models.shape import ModelShape
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Environment, Variant, parse_recipe
from ziplm_deploy.reporting import collect
from ziplm_deploy.reporting.facts import FamilyFacts
from ziplm_deploy.reporting.records import FamilyReport, FileReport, MemberReport
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Generation
from ziplm_deploy.stages import report
from ziplm_deploy.tasks.record import Scores

DATE = "2026-01-01T00:00:00+00:00"


def machine() -> MachineInfo:
    return MachineInfo(
        cpu_model="A | CPU",
        isa_flags=("avx2",),
        logical_cores=4,
        usable_cores=2,
        memory_bytes=8 * 2**30,
        operating_system="Linux 1",
    )


def timing(median_ms: float) -> WorkloadTiming:
    return WorkloadTiming(
        median_ms=median_ms, low_ms=0.99 * median_ms, high_ms=1.01 * median_ms, p90_ms=1.1 * median_ms,
        p99_ms=1.2 * median_ms, n=9,
    )  # fmt: skip


def latency_table(**changes: Any) -> LatencyTable:
    """Two layers, 2 heads, width 16: dense 10 ms = base 2 + 2 x (1 + 3); everything dropped: 2.4 ms."""
    cells = [("attention", 0, 0.1), ("attention", 1, 0.6), ("attention", 2, 1.0)]
    cells += [("ffn", 0, 0.1), ("ffn", 8, 1.5), ("ffn", 16, 3.0)]
    fields: dict[str, Any] = {
        "machine": machine(),
        "engine": "onnxruntime",
        "engine_version": "1.0",
        "environment": Environment(),
        "graph": "BertModel",
        "shape": ModelShape(
            model_type="bert", n_layers=2, hidden_size=32, n_heads=2, head_dim=16, intermediate_size=16
        ),
        "shapes": "dynamic",
        "opset": 17,
        "stack_depth": 4,
        "base": timing(2.0),
        "dense": timing(10.0),
        "cells": [Cell(kind=kind, size=size, timing=timing(ms)) for kind, size, ms in cells],
        "date": DATE,
        "measuring_seconds": 1.0,
        "total_seconds": 2.0,
    }
    return LatencyTable(**{**fields, **changes})


def plan(target: float, **changes: Any) -> PruningPlan:
    fields: dict[str, Any] = {
        "speedup_target": target,
        "budget_ms": 3.0,
        "method": "ziplm",
        "sizes": {"0.attention": 1, "0.ffn": 8, "1.attention": 0, "1.ffn": 8},
        "predicted_ms": 10.0 / target,
        "predicted_speedup": target * 1.01,
        "search_loss": 0.01,
        "seed_losses": {"relative-error": 0.03, "uniform": 0.02, "measured": 0.015},
        "evaluations": 40,
    }
    return PruningPlan(**{**fields, **changes})


def variant(name: str, speedup: float, half_width: float = 0.01) -> FileTiming:
    latency = Timing(**timing(10.0 / speedup).model_dump())
    return FileTiming(
        name=name,
        path=f"{name}/model.onnx",
        latency=latency,
        p50_ms=latency.median_ms,
        throughput_per_second=100.0 * speedup,
        peak_memory_bytes=2**20,
        speedup=speedup,
        speedup_low=speedup - half_width,
        speedup_high=speedup + half_width,
        samples_ms=[latency.median_ms] * 3,
    )


def benchmark_record(**speedups: float) -> BenchmarkRecord:
    """``benchmark_record(**{"2x": 2.01})``: the dense model and these members."""
    return BenchmarkRecord(
        machine=machine(),
        engine="onnxruntime",
        engine_version="1.0",
        environment=Environment(),
        baseline="dense",
        aa_ratio=1.001,
        aa_low=0.995,
        aa_high=1.006,
        variants=[variant("dense", 1.0), *(variant(name, speedup) for name, speedup in speedups.items())],
        date=DATE,
        seconds=3.0,
    )


def member(name: str, **changes: Any) -> MemberReport:
    """A member; figures, variant and accuracy among ``changes`` are those of the file that its target is about."""
    target = None if name == "dense" else float(name.removesuffix("x"))
    measured = target or 1.0
    served: dict[str, Any] = {
        "variant": Variant.FP32,
        "measured_speedup": measured,
        "measured_low": measured - 0.01,
        "measured_high": measured + 0.01,
        "p50_ms": 10.0 / measured,
        "p99_ms": 12.0 / measured,
        "throughput_per_second": 100.0 * measured,
        "onnx_bytes": int(90_000_000 / measured),
        "accuracy": {"spearman": 0.87 / measured**0.01, "pearson": 0.86, "mean_cosine": 0.9},
    }
    if target is None:
        served["accuracy"].pop("mean_cosine")
    served |= {key: changes.pop(key) for key in ("accuracy_intervals", "of_dense") if key in changes}
    served |= {key: changes.pop(key) for key in list(changes) if key in served}
    fields: dict[str, Any] = {
        "name": name,
        "folder": name,
        "speedup_target": target,
        "predicted_speedup": None if target is None else target * 1.01,
        "parameters": int(22_000_000 / measured),
        "served": file(Variant(served.pop("variant")), **served),
        "sizes": {"0.attention": 2, "0.ffn": 16, "1.attention": 0, "1.ffn": 8},
        "search_loss": None if target is None else 0.01,
        "seed_losses": {} if target is None else {"uniform": 0.02},
        "verdict": "baseline" if target is None else "reached",
    }
    return MemberReport(**{**fields, **changes})


def family_report(*members: MemberReport, **changes: Any) -> FamilyReport:
    fields: dict[str, Any] = {
        "name": "demo",
        "model": "some/model",
        "task": "sentence-similarity",
        "metric": "spearman",
        "method": "ziplm",
        "machine": machine(),
        "engine": "onnxruntime",
        "engine_version": "1.0",
        "environment": Environment(),
        "members": list(members) or [member("dense"), member("2x")],
        "aa_ratio": 1.001,
        "aa_low": 0.995,
        "aa_high": 1.006,
        "notes": ["calibration has few tokens"],
        "stage_seconds": {"profile": 12.3},
        "versions": {"python": "3.11.0"},
        "date": DATE,
    }
    return FamilyReport(**{**fields, **changes})


def file(variant: Variant, **changes: Any) -> FileReport:
    fields: dict[str, Any] = {
        "variant": variant,
        "file": variant.file_name,
        "engine": "onnxruntime",
        "measured_speedup": 2.0,
        "measured_low": 1.99,
        "measured_high": 2.01,
        "p50_ms": 5.0,
        "p99_ms": 6.0,
        "throughput_per_second": 200.0,
        "peak_memory_bytes": 2**20,
        "onnx_bytes": 45_000_000,
        "gzip_bytes": 40_000_000,
        "accuracy": {"spearman": 0.86},
        "recommended": True,
    }
    return FileReport(**{**fields, **changes})


def int8_record(**changes: Any) -> Int8Record:
    """Twelve linears, all in INT8, inside the accuracy budget."""
    fields: dict[str, Any] = {
        "method": "static",
        "backend": "onnxruntime",
        "ranges": "minmax",
        "per_channel": True,
        "weight_bits": 8,
        "n_linears": 12,
        "fp32_linears": [],
        "reference_score": 0.87,
        "scores": [0.865],
        "within_budget": True,
        "sensitivities": [],
        "ruined_by_outliers": [],
    }
    return Int8Record(**{**fields, **changes})


class FinishedRun(SimpleNamespace):
    """What the report stage reads of a run."""

    @staticmethod
    def file_hash(path: Path) -> str:
        return file_hash(path)

    @property
    def members(self) -> tuple[Member, ...]:
        return (self.dense_member, *self.pruned_members)

    def generation_of(self, member: Member) -> Generation:
        return Generation(self.dense_member, self.pruned_members)

    def member(self, name: str) -> Member:
        return next(member for member in self.members if member.name == name)

    def report(self) -> FamilyReport:
        with mock.patch.object(report, "member_key", return_value="key"):
            return collect.family_report(report.family_facts(self))  # type: ignore[arg-type]

    def files(self, name: str) -> list[FileReport]:
        """Reports of a member's files; others need not have been timed."""
        member, record = self.member(name), BenchmarkRecord.load(self.folder.benchmark)
        facts = report._files(self, member, record, BaselineScores(baselines={}, gains={}))  # type: ignore[arg-type]
        family = FamilyFacts(self.recipe, "spearman", record, self.table, [], [], {})
        reports: list[FileReport] = []
        for each in facts:
            reports.append(collect._file_report(family, each, reports, is_pruned=name != "dense"))
        return reports


def finished_run(
    output_dir: Path, record: BenchmarkRecord, scores: Mapping[str, float], **settings: Any
) -> FinishedRun:
    """A run of the targets 2x and 4x, by hand; ``scores``: of every member's files."""
    given: dict[str, Any] = {
        "name": "demo",
        "output_dir": output_dir,
        "model": {"path": "some/model", "task": "sentence-similarity"},
        "data": {"evaluation": "some.jsonl"},
        "speedups": [2, 4],
    }
    recipe = parse_recipe({**given, **settings})
    folder = RunFolder(recipe)
    folder.set_note("a topic", "a note")
    run = FinishedRun(
        recipe=recipe,
        folder=folder,
        table=latency_table(),
        task=SimpleNamespace(metric_name="spearman", ort_class="ORTModelForFeatureExtraction", is_causal=False),
        trains=False,
        data=SimpleNamespace(sampled_texts=None),
        dense_member=folder.dense_member,
        pruned_members=(folder.member(2.0), folder.member(4.0)),
    )
    record.save(folder.benchmark)
    record.save(folder.generation_benchmark("dense"))  # as if the closed loop had measured the same
    for member in run.members:
        member.folder.mkdir()
        save_file({"w": np.zeros((2, 8), np.float32)}, member.weights)
        for variant in recipe.variants:
            made = member.file(variant)
            made.path.write_bytes(b"x" * 100)
            score = {"spearman": scores[made.label]}
            Scores(metric="spearman", scores=score, n_rows=9, engine=None, engine_version=None).save(made.scores)
    plan(2.0).save(run.member("2x").plan)
    plan(4.0, search_loss=None, seed_losses={}).save(run.member("4x").plan)
    return run
