"""Workloads of several calls: weighted sums against hand-computed ones, in tables and in benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.models import tiny_model
from tests.helpers.onnx_models import write_mlp
from tests.helpers.reports import benchmark_record, latency_table
from ziplm_deploy.artifacts import content_key
from ziplm_deploy.cli.console import print_benchmark
from ziplm_deploy.errors import CorruptArtifactError, IncompatibleArtifactError
from ziplm_deploy.latency import benchmark as benchmarking
from ziplm_deploy.latency import profile as profiling
from ziplm_deploy.latency.benchmark import FileWorker, TimedFile, compare
from ziplm_deploy.latency.cells import Samples, cells_of
from ziplm_deploy.latency.grid import Grid
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.request import TableRequest, check_table
from ziplm_deploy.latency.statistics import Timing, WorkloadTiming, summarize, summarize_calls
from ziplm_deploy.latency.table import Cell, LatencyTable, PrunedSample
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.recipe import BenchmarkConfig, Environment, ExportConfig, ProfileConfig, Workload

MIXED = Environment(workload=Workload(lengths={8: 3, 32: 1}))
WEIGHTS = (0.75, 0.25)
LONGER = 3.0  # times as long a call of 32 tokens takes as one of 8, in files made by hand
QUICK = BenchmarkConfig(rounds=6, processes=2, max_processes=2)


def timing(*medians_ms: float) -> WorkloadTiming:
    """Timing of a workload of two calls."""
    each = [
        Timing(median_ms=ms, low_ms=0.99 * ms, high_ms=1.01 * ms, p90_ms=1.1 * ms, p99_ms=1.2 * ms, n=9)
        for ms in medians_ms
    ]
    whole = {name: sum(w * getattr(t, name) for w, t in zip(WEIGHTS, each, strict=True)) for name in MILLISECONDS}
    return WorkloadTiming(**whole, n=9, of_calls=each)


MILLISECONDS = ("median_ms", "low_ms", "high_ms", "p90_ms", "p99_ms")


def mixed_table(**changes: Any) -> LatencyTable:
    """The table of ``tests/helpers/reports.py`` as one of two calls, the second ``LONGER`` times as long."""
    one = latency_table()
    double = {name: timing(ms, LONGER * ms) for name, ms in (("base", 2.0), ("dense", 10.0))}
    cells = [
        Cell(kind=cell.kind, size=cell.size, timing=timing(cell.timing.median_ms, LONGER * cell.timing.median_ms))
        for cell in one.cells
    ]
    return LatencyTable(**{**dict(one), **double, "cells": cells, "environment": MIXED, **changes})


SIZES = {"0.attention": 1, "0.ffn": 8, "1.attention": 0, "1.ffn": 16}  # 2 + 0.6 + 1.5 + 0.1 + 3


def test_a_plan_costs_the_weighted_sum_of_its_calls() -> None:
    table = mixed_table()
    assert table.sum_ms(SIZES, 0) == pytest.approx(7.2)
    assert table.sum_ms(SIZES, 1) == pytest.approx(7.2 * LONGER)
    expected = 0.75 * 7.2 + 0.25 * 7.2 * LONGER
    assert table.sum_ms(SIZES) == table.predict_ms(SIZES) == pytest.approx(expected)
    assert table.predict_ms(SIZES, 1) == pytest.approx(7.2 * LONGER)
    modules_ms = expected - table.base.median_ms
    assert table.predict_speedup(modules_ms) == pytest.approx(10 / 7.2)
    assert table.modules_budget_ms(10 / 7.2) == pytest.approx(modules_ms)
    assert table.largest_speedup() == pytest.approx(10.0 / 2.4)


def test_whole_models_correct_each_call_and_the_sum_for_themselves() -> None:
    """The first call takes as long as its parts, the second 8 % longer."""
    sizes = {"0.attention": 1, "0.ffn": 8, "1.attention": 0, "1.ffn": 8}  # 5.7
    whole = PrunedSample(sizes=sizes, timing=timing(5.7, 5.7 * LONGER * 1.08))
    table = mixed_table(wholes=[whole], dense=timing(10.0, 10.0 * LONGER * 1.08))
    assert table.predict_ms(sizes, 0) == pytest.approx(5.7, rel=0.002)
    assert table.predict_ms(sizes, 1) == pytest.approx(5.7 * LONGER * 1.08, rel=0.02)
    assert table.predict_ms(sizes) == pytest.approx(whole.timing.median_ms, rel=0.02)
    assert table.predict_ms(sizes) > table.sum_ms(sizes) * 1.02


def test_a_table_of_several_calls_survives_the_disk(tmp_path: Path) -> None:
    table = mixed_table()
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert table.environment.workload.calls[1].seq_len == 32


@pytest.mark.parametrize("place", ["base", "cell"])
@pytest.mark.parametrize("change", ["no calls", "one call", "another sum"])
def test_timings_that_are_not_of_the_calls_are_refused(tmp_path: Path, place: str, change: str) -> None:
    path = tmp_path / "table.json"
    mixed_table().save(path)
    fields = json.loads(path.read_text(encoding="utf-8"))
    entry = fields["base"] if place == "base" else fields["cells"][2]["timing"]
    if change == "another sum":
        entry["median_ms"] *= 1.01
    else:
        entry["of_calls"] = entry["of_calls"][:1] if change == "one call" else []
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="weighted sum of the calls" if "sum" in change else "each of 2"):
        LatencyTable.load(path)


@pytest.mark.parametrize("artifact", [latency_table(), benchmark_record(**{"2x": 2.0})], ids=lambda a: a.KIND)
def test_files_of_schema_2_are_those_of_one_call(tmp_path: Path, artifact: Any) -> None:
    """Files of one call hold what they held in schema 2, word by word, so that keys made of them hold, too."""
    path = tmp_path / "a.json"
    artifact.save(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["schema_version"] == 3
    assert "calls" not in path.read_text(encoding="utf-8")
    assert saved["environment"]["workload"] == {"batch_size": 1, "seq_len": 128}
    path.write_text(json.dumps({**saved, "schema_version": 2}), encoding="utf-8")
    assert type(artifact).load(path) == artifact
    assert content_key(of=type(artifact).load(path)) == content_key(of=artifact)
    saved["environment"]["workload"]["lengths"] = {"8": 1.0, "128": 1.0}
    path.write_text(json.dumps({**saved, "schema_version": 2}), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="one call in a file of schema 2"):
        type(artifact).load(path)


def test_a_summary_of_one_call_is_the_one_there_was() -> None:
    samples_ms = np.random.default_rng(0).lognormal(0, 0.1, (1, 31))
    assert summarize_calls(samples_ms, (1.0,)).model_dump() == summarize(samples_ms[0]).model_dump()


def test_a_summary_of_calls_holds_each_and_their_weighted_sum() -> None:
    generator = np.random.default_rng(0)
    samples_ms = np.array([[1.0], [4.0]]) * generator.lognormal(0, 0.05, (2, 400))
    found = summarize_calls(samples_ms, WEIGHTS)
    assert [each.median_ms for each in found.of_calls] == np.median(samples_ms, axis=1).tolist()
    assert found.median_ms == pytest.approx(0.75 * found.of_calls[0].median_ms + 0.25 * found.of_calls[1].median_ms)
    assert found.low_ms < found.median_ms < found.high_ms
    # independent noise: the sum is relatively surer than its parts
    width = (found.high_ms - found.low_ms) / found.median_ms
    assert all(width < (each.high_ms - each.low_ms) / each.median_ms for each in found.of_calls)
    assert found.p99_ms == pytest.approx(np.quantile(WEIGHTS @ samples_ms, 0.99))


def truth_ms(kind: str, size: int, call: int) -> float:
    return (0.1 + (0.8 * size if kind == "attention" else 0.005 * size)) * (1, LONGER)[call]


class FormulaWorker:
    """An additive machine with two calls, of which the second takes ``LONGER`` times as long."""

    def time_many(self, order: list[tuple[str, int]], warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        return [self.latency_ms(*timed) for timed in order]

    def latency_ms(self, model_id: str, call: int) -> float:
        fixed = {"none": 0.3, "base": 0.9, "dense": 40.0, "both dropped": 0.3 + 4 * 0.2}
        if model_id in fixed:
            return fixed[model_id] * (1, LONGER)[call]
        kind, size = model_id.split()
        return 0.3 * (1, LONGER)[call] + 4 * (truth_ms(kind, int(size), call) + 0.1 * (1, LONGER)[call])

    def warm_up(self, model_id: str) -> None:
        pass


def test_cells_of_every_call_follow_from_its_own_stacks() -> None:
    grid = Grid(model_shape(tiny_model("bert").config), ProfileConfig(max_rounds=15))
    samples = Samples(WEIGHTS)
    worker: Any = FormulaWorker()
    ids = ["dense", "base", "none", *grid.cell_ids]
    profiling._measure(worker, ids, samples, grid, lambda rounds: None, seed=0)
    assert {ms.shape[0] for ms in samples.of_calls.values()} == {2}
    assert samples.of_calls["dense"].shape[1] == 3 * samples.of_calls["base"].shape[1]  # timed more often, on each call
    for cell in cells_of(samples, grid):
        if cell.size:
            each = [truth_ms(cell.kind, cell.size, call) for call in (0, 1)]
            assert [call.median_ms for call in cell.timing.of_calls] == pytest.approx(each)
            assert cell.timing.median_ms == pytest.approx(0.75 * each[0] + 0.25 * each[1])


class StackedWorker(FormulaWorker):
    """The same machine, whose stacks are as deep as a grid says."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def latency_ms(self, model_id: str, call: int) -> float:
        scale = (1, LONGER)[call]
        if model_id == "both dropped":
            return (0.3 + self.grid.depth("attention", 0) * 0.2) * scale
        if model_id in ("none", "base", "dense"):
            return super().latency_ms(model_id, call)
        kind, size = model_id.split()
        depth = self.grid.depth(kind, int(size))  # type: ignore[arg-type]
        return 0.3 * scale + depth * (truth_ms(kind, int(size), call) + 0.1 * scale)


def test_cells_follow_from_stacks_of_unlike_depth() -> None:
    shape = model_shape(tiny_model("bert").config).model_copy(update={"n_layers": 20})
    grid = Grid(shape, ProfileConfig(max_rounds=15), {"attention": 50.0, "ffn": 10.0}, stack_bytes=2000)
    assert len({grid.depth(*cell) for cell in grid.cell_ids.values()}) > 3
    samples, worker = Samples(WEIGHTS), StackedWorker(grid)
    ids = ["dense", "base", "none", *grid.cell_ids]
    profiling._measure(worker, ids, samples, grid, lambda rounds: None, seed=0)  # type: ignore[arg-type]
    for cell in cells_of(samples, grid):
        if cell.size:
            each = [truth_ms(cell.kind, cell.size, call) for call in (0, 1)]
            assert [call.median_ms for call in cell.timing.of_calls] == pytest.approx(each)


@pytest.mark.usefixtures("one_process")
def test_a_measured_table_has_a_column_for_every_call() -> None:
    quick = ProfileConfig(min_rounds=3, max_rounds=3, max_seconds=20, width_ratio=0.31, stack_depth=1)
    dense = tiny_model("bert", max_position_embeddings=400, num_attention_heads=2)
    mixed = Environment(workload=Workload(lengths={8: 1, 384: 1}))
    asked = TableRequest(dense, ("last_hidden_state",), mixed, quick, ExportConfig())
    table = measure_table(asked)
    short, long = table.dense.of_calls
    assert long.median_ms > 2 * short.median_ms
    assert table.dense.median_ms == pytest.approx((short.median_ms + long.median_ms) / 2)
    check_table(table, asked)
    other = Environment(workload=Workload(lengths={8: 2, 384: 1}))
    with pytest.raises(IncompatibleArtifactError, match="calls: expected"):
        check_table(table, TableRequest(dense, ("last_hidden_state",), other, quick, ExportConfig()))


class StagedWorker:
    """A process whose calls take the same milliseconds each time."""

    version = "1.0"

    def __init__(self, file: TimedFile, environment: Environment, *, wait: bool) -> None:
        self.ms = {"dense": (8.0, 40.0), "2x": (5.0, 10.0)}[file.path.stem]

    def __enter__(self) -> StagedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load(self, model_id: str, path: Path) -> None:
        pass

    def time(self, model_id: str, n: int, warmup: int = 1, warmup_ms: float = 0.0, call: int = 0) -> list[float]:
        return [self.ms[call]] * n

    def peak_memory_bytes(self) -> int:
        return 50

    def huge_page_bytes(self) -> int | None:
        return None


def test_the_speedup_is_that_of_the_weighted_sum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarking, "start_worker", StagedWorker)
    record = compare({"dense": Path("dense.onnx"), "2x": Path("2x.onnx")}, MIXED, QUICK, "dense")
    found = record.variant("2x")
    dense_ms, member_ms = 0.75 * 8 + 0.25 * 40, 0.75 * 5 + 0.25 * 10
    assert record.variant("dense").p50_ms == pytest.approx(dense_ms)
    assert (found.p50_ms, found.latency.median_ms) == pytest.approx((member_ms, member_ms))
    assert found.speedup == pytest.approx(dense_ms / member_ms)
    assert found.throughput_per_second == pytest.approx(1000 / member_ms)
    assert [(call.seq_len, call.weight, call.p50_ms) for call in found.calls] == [(8, 0.75, 5.0), (32, 0.25, 10.0)]
    assert [call.speedup for call in found.calls] == pytest.approx([1.6, 4.0])
    assert [call.speedup for call in record.variant("dense").calls] == [1.0, 1.0]
    assert {len(call.samples_ms) for call in found.calls} == {len(found.samples_ms)}
    record.save(tmp_path / "record.json")
    assert BenchmarkRecord.load(tmp_path / "record.json") == record
    print_benchmark(record)
    shown = capsys.readouterr().out
    assert "each call: median, and speedup [95 %]" in shown
    assert "10.00 ms, 4.00x [4.00, 4.00]" in shown


def test_a_worker_adds_up_its_calls_and_keeps_them() -> None:
    inner: Any = StagedWorker(TimedFile(Path("2x.onnx")), MIXED, wait=False)
    worker = FileWorker(inner, WEIGHTS)
    assert worker.time("model", n=2) == [6.25, 6.25]
    assert worker.calls == [[[5.0, 5.0]], [[10.0, 10.0]]]


def test_real_files_take_longer_on_longer_calls(tmp_path: Path) -> None:
    files = {name: write_mlp(tmp_path / f"{name}.onnx", width) for name, width in (("dense", 4096), ("4x", 1024))}
    environment = Environment(workload=Workload(batch_size=2, lengths={16: 1, 256: 1}))
    record = compare(files, environment, QUICK, "dense")
    for variant in record.variants:
        short, long = variant.calls
        assert long.p50_ms > 2 * short.p50_ms
        assert variant.p50_ms == pytest.approx((short.p50_ms + long.p50_ms) / 2, rel=0.2)
    assert record.variant("4x").speedup > 1.2
