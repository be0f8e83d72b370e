"""Artifacts made by hand, for tests of files, reports and the command line."""

from __future__ import annotations

from typing import Any

from ziplm_deploy.artifacts import (
    BenchmarkRecord,
    Cell,
    FamilyReport,
    LatencyTable,
    MachineInfo,
    MemberReport,
    ModelShape,
    PruningPlan,
    Timing,
    VariantResult,
)
from ziplm_deploy.config import Environment

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


def timing(median_ms: float) -> Timing:
    return Timing(
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


def variant(name: str, speedup: float, half_width: float = 0.01) -> VariantResult:
    latency = timing(10.0 / speedup)
    return VariantResult(
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
    target = None if name == "dense" else float(name.removesuffix("x"))
    measured = target or 1.0
    fields: dict[str, Any] = {
        "name": name,
        "folder": name,
        "speedup_target": target,
        "predicted_speedup": None if target is None else target * 1.01,
        "measured_speedup": measured,
        "measured_low": measured - 0.01,
        "measured_high": measured + 0.01,
        "p50_ms": 10.0 / measured,
        "p99_ms": 12.0 / measured,
        "throughput_per_second": 100.0 * measured,
        "peak_memory_bytes": 2**20,
        "parameters": int(22_000_000 / measured),
        "onnx_bytes": int(90_000_000 / measured),
        "accuracy": {"spearman": 0.87 / measured**0.01, "pearson": 0.86, "mean_cosine": 0.9},
        "sizes": {"0.attention": 2, "0.ffn": 16, "1.attention": 0, "1.ffn": 8},
        "search_loss": None if target is None else 0.01,
        "seed_losses": {} if target is None else {"uniform": 0.02},
        "verdict": "baseline" if target is None else "reached",
    }
    if target is None:
        fields["accuracy"].pop("mean_cosine")
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
