"""The benchmark loop: order, ratios, the A/A line, limits, and models that fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.helpers.onnx_models import write_mlp
from ziplm_deploy.engines import WorkerHandle, get_engine
from ziplm_deploy.errors import EngineError, UsageError
from ziplm_deploy.latency import benchmark as benchmarking
from ziplm_deploy.latency.benchmark import AA, TimedFile, compare
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.recipe import BenchmarkConfig, Environment, Workload

ENVIRONMENT = Environment(workload=Workload(batch_size=2, seq_len=32))
QUICK = BenchmarkConfig(rounds=8, processes=2, max_processes=2, runs_per_round=2)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {
        name: write_mlp(tmp_path / f"{name}.onnx", width) for name, width in (("dense", 8192), ("3x", 1024), ("9x", 64))
    }


def test_record_is_complete_and_survives_the_disk(models: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    record = compare(models, ENVIRONMENT, QUICK, "dense", lambda done, total: seen.append((done, total)))
    assert [variant.name for variant in record.variants] == ["dense", "3x", "9x"]
    assert seen[0] == (1, 8)
    dense, faster, fastest = record.variants
    assert (dense.speedup, dense.speedup_low, dense.speedup_high) == (1.0, 1.0, 1.0)
    assert 1.5 < faster.speedup < fastest.speedup
    assert record.aa_low <= record.aa_ratio <= record.aa_high
    assert 0.3 < record.aa_ratio < 3
    for variant in record.variants:
        assert variant.latency.n == len(variant.samples_ms) == 2 * len(seen)
        assert variant.speedup_low <= variant.speedup <= variant.speedup_high
        assert variant.p50_ms == np.median(variant.samples_ms)
        assert variant.throughput_per_second == pytest.approx(2000 / variant.p50_ms)
        assert variant.latency.p90_ms <= variant.latency.p99_ms
        assert variant.peak_memory_bytes > 2**24
        assert (variant.engine, variant.engine_version) == (record.engine, record.engine_version)
        assert variant.path == str(models[variant.name])
    assert (record.engine, record.engine_version) == ("onnxruntime", get_engine("onnxruntime").version())
    assert record.seconds > 0
    record.save(tmp_path / "record.json")
    assert BenchmarkRecord.load(tmp_path / "record.json") == record


def test_baseline_may_be_any_model_and_alone(models: dict[str, Path]) -> None:
    record = compare({"9x": models["9x"]}, ENVIRONMENT, QUICK, "9x")
    assert [variant.name for variant in record.variants] == ["9x"]


def test_every_model_may_run_on_its_own_engine(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    files = {
        "dense": TimedFile(models["dense"], "onnxruntime"),
        "dense (openvino)": TimedFile(models["dense"]),
        "9x": models["9x"],
    }
    environment = ENVIRONMENT.model_copy(update={"engine": "openvino"})
    record = compare(files, environment, QUICK, "dense")
    versions = {name: get_engine(name).version() for name in ("onnxruntime", "openvino")}
    assert (record.engine, record.engine_version) == ("openvino", versions["openvino"])
    assert {variant.name: variant.engine for variant in record.variants} == {
        "dense": "onnxruntime",
        "dense (openvino)": "openvino",
        "9x": "openvino",
    }
    assert all(variant.engine_version == versions[variant.engine] for variant in record.variants)
    assert record.variant("9x").speedup > 1.5 * record.variant("dense (openvino)").speedup
    assert record.variant("dense").speedup == 1.0
    record.save(tmp_path / "record.json")
    assert BenchmarkRecord.load(tmp_path / "record.json") == record


def test_deepsparse_beside_onnx_runtime(tmp_path: Path) -> None:
    try:
        get_engine("deepsparse").version()
    except EngineError as missing:
        pytest.skip(str(missing))
    path = write_mlp(tmp_path / "a.onnx", 64, batch=2, tokens=32, opset=16)
    on = {name: TimedFile(path, name) for name in ("onnxruntime", "deepsparse")}  # type: ignore[arg-type]
    record = compare(on, ENVIRONMENT, QUICK, "onnxruntime")
    assert {variant.engine for variant in record.variants} == set(on)
    dynamic = write_mlp(tmp_path / "dynamic.onnx", 64, opset=16)
    with pytest.raises(EngineError, match=r"dynamic\.onnx.*dynamic axes: .*export with static shapes"):
        compare({"onnxruntime": path, "dynamic": TimedFile(dynamic, "deepsparse")}, ENVIRONMENT, QUICK, "onnxruntime")


def test_a_missing_engine_is_named_before_anything_is_timed(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZIPLM_DEEPSPARSE_PYTHON", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(WorkerHandle, "time", lambda *arguments, **options: pytest.fail("timed"))
    files = {"dense": models["dense"], "3x": TimedFile(models["3x"], "deepsparse")}
    with pytest.raises(EngineError, match="ziplm-deploy setup deepsparse"):
        compare(files, ENVIRONMENT, QUICK, "dense")


class ScriptedWorker:
    """Answers with the milliseconds of a formula, and notes who was asked when."""

    def __init__(self, name: str, milliseconds: float, calls: list[str], clock: dict[str, float]) -> None:
        self.name, self.milliseconds, self.calls, self.clock = name, milliseconds, calls, clock

    def time(self, model_id: str, n: int, warmup: int = 1, warmup_ms: float = 0.0, call: int = 0) -> list[float]:
        assert (warmup, warmup_ms) == (1, 10.0)  # of a short model as of a long one
        self.calls.append(self.name)
        return [self.milliseconds * self.clock.setdefault("speed", 1.0)] * n


def scripted(calls: list[str], clock: dict[str, float] | None = None) -> dict[str, WorkerHandle]:
    clock = {} if clock is None else clock
    latencies = {"dense": 10.0, "2x": 5.0, AA: 10.0}
    return {name: ScriptedWorker(name, ms, calls, clock) for name, ms in latencies.items()}  # type: ignore[misc]


def sure(rounds: dict[str, list[list[float]]]) -> bool:
    return False


def test_rounds_visit_everybody_once_in_changing_order() -> None:
    calls: list[str] = []
    rounds = benchmarking._interleave(scripted(calls), BenchmarkConfig(rounds=40), None, seed=0, unsure=sure)
    visits = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert all(sorted(visit) == sorted(rounds) for visit in visits)
    assert len(set(visits)) > 3


def test_time_limit_ends_after_a_few_whole_rounds() -> None:
    config = BenchmarkConfig(rounds=1000, max_seconds=1e-9)
    rounds = benchmarking._interleave(scripted([]), config, None, seed=0, unsure=sure)
    assert {len(samples) for samples in rounds.values()} == {3}


@pytest.mark.parametrize(("n_files", "n_rounds"), [(5, 40), (10, 20), (20, 20), (30, 20)])
def test_more_files_than_ten_get_more_time(monkeypatch: pytest.MonkeyPatch, n_files: int, n_rounds: int) -> None:
    now = [0.0]
    monkeypatch.setattr(benchmarking.time, "monotonic", lambda: now[0])

    class SlowWorker(ScriptedWorker):
        def time(self, model_id: str, n: int, warmup: int = 1, warmup_ms: float = 0.0, call: int = 0) -> list[float]:
            now[0] += 1.0
            return super().time(model_id, n, warmup, warmup_ms)

    names = ["dense", *(f"file {index}" for index in range(1, n_files))]
    workers = {name: SlowWorker(name, 10.0, [], {}) for name in names}
    again = {AA: ScriptedWorker(AA, 10.0, [], {})}
    config = BenchmarkConfig(rounds=1000, max_seconds=195.0)
    rounds = benchmarking._interleave({**workers, **again}, config, None, seed=0, unsure=sure)  # type: ignore[arg-type]
    assert {len(samples) for samples in rounds.values()} == {n_rounds}


@pytest.mark.parametrize(("rounds", "processes", "share"), [(60, 5, 12), (32, 3, 11), (5, 9, 1)])
def test_rounds_are_shared_among_processes(rounds: int, processes: int, share: int) -> None:
    part = benchmarking._part(BenchmarkConfig(rounds=rounds, processes=processes, max_seconds=90))
    assert (part.rounds, part.max_seconds) == (share, pytest.approx(90 / processes))


def test_a_process_takes_more_rounds_while_noise_leaves_a_judged_ratio_unsure() -> None:
    quiet, noisy = [[10.0]] * 20, [[10.0], [14.0]] * 10
    rounds = {"dense": quiet, AA: quiet, "2x": quiet, "torch": noisy}
    judged = {AA, "2x"}
    assert not benchmarking.is_unsure(rounds, "dense", judged, 0.005)
    assert benchmarking.is_unsure(rounds, "dense", {*judged, "torch"}, 0.005)
    assert benchmarking.is_unsure({**rounds, AA: noisy}, "dense", judged, 0.005)  # the noise floor, too
    assert benchmarking.is_unsure(
        {**rounds, "dense": [[10.0]] * 2, "2x": [[5.0]] * 2, AA: quiet[:2]}, "dense", judged, 1
    )
    # shared slowness is no noise of a ratio
    assert not benchmarking.is_unsure({"dense": noisy, AA: noisy, "2x": noisy}, "dense", judged, 0.005)

    config, asked = BenchmarkConfig(rounds=10), []

    def until_fifteen(rounds: dict[str, list[list[float]]]) -> bool:
        asked.append(len(rounds["2x"]))
        return asked[-1] < 15

    assert len(benchmarking._interleave(scripted([]), config, None, 0, until_fifteen)["2x"]) == 15
    assert asked == [10, 11, 12, 13, 14, 15]  # never before its share
    told: list[tuple[int, int]] = []
    always = benchmarking._interleave(scripted([]), config, lambda *step: told.append(step), 0, lambda rounds: True)
    assert {len(samples) for samples in always.values()} == {30}
    assert told[8:12] == [(9, 10), (10, 10), (10, 10), (10, 10)]


class StagedWorker(contextlib.nullcontext["StagedWorker"]):
    """Of the processes that are started for ``2x``, the second is a third slower than the others."""

    version = "1.0"
    started: ClassVar[list[str]] = []

    def __init__(self, subject: TimedFile, environment: Environment, *, wait: bool) -> None:
        super().__init__(self)
        self.name = subject.path.stem
        self.started.append(self.name)
        slow = self.name == "2x" and self.started.count("2x") == 2
        self.milliseconds = {"dense": 10.0, "2x": 5.0}[self.name] * (4 / 3 if slow else 1)

    def load(self, model_id: str, path: Path) -> None:
        pass

    def time(self, model_id: str, n: int, warmup: int = 1, warmup_ms: float = 0.0, call: int = 0) -> list[float]:
        return [self.milliseconds] * n

    def peak_memory_bytes(self) -> int:
        return 100 if self.started.count("2x") == 2 else 50

    def huge_page_bytes(self) -> int | None:
        return None


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(benchmarking, "start_worker", StagedWorker)
    monkeypatch.setattr(StagedWorker, "started", [])
    return {"dense": Path("dense.onnx"), "2x": Path("2x.onnx")}


def test_a_process_that_was_slow_widens_the_interval_and_asks_for_more(staged: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    config = BenchmarkConfig(rounds=30, processes=3, max_processes=6)
    record = compare(staged, ENVIRONMENT, config, "dense", lambda done, total: seen.append((done, total)))
    parts = [StagedWorker.started[start : start + 3] for start in range(0, 18, 3)]
    assert [sorted(part) for part in parts] == [["2x", "dense", "dense"]] * 6  # the baseline twice
    assert len({tuple(part) for part in parts}) > 1  # nobody is always the first
    found = record.variant("2x")
    assert found.speedup == pytest.approx(2.0 * 0.75 ** (1 / 6))
    assert found.speedup_low < 1.7 < 2.0 < found.speedup_high
    assert (record.aa_low, record.aa_high) == pytest.approx((1.0, 1.0))
    assert found.p50_ms == 5.0
    assert record.rounds_of_processes == [10] * 6
    assert found.peak_memory_bytes == 100
    assert [done for done, _ in seen] == list(range(1, 61))
    assert [total for _, total in seen] == [30] * 30 + [40] * 10 + [50] * 10 + [60] * 10


def test_processes_end_as_soon_as_the_question_is_decided(staged: dict[str, Path]) -> None:
    config = BenchmarkConfig(rounds=30, processes=3, max_processes=6)
    asked: list[set[str]] = []

    def after_four(ratios: Mapping[str, Ratio]) -> bool:
        asked.append(set(ratios))
        return len(asked) == 2

    record = compare(staged, ENVIRONMENT, config, "dense", decided=after_four)
    assert asked == [{AA, "2x"}] * 2
    assert len(record.rounds_of_processes) == 4


def test_what_only_steers_a_run_may_end_before_the_first_processes_are_over(staged: dict[str, Path]) -> None:
    config = BenchmarkConfig(rounds=30, processes=3, max_processes=6)
    record = compare(staged, ENVIRONMENT, config, "dense", decided=lambda ratios: True, earliest=2)
    assert record.rounds_of_processes == [10] * 2
    record = compare(staged, ENVIRONMENT, config, "dense", decided=lambda ratios: True, earliest=4)
    assert record.rounds_of_processes == [10] * 3  # a recipe that asks for fewer gets fewer


def test_files_aside_have_the_first_processes_only(staged: dict[str, Path]) -> None:
    config = BenchmarkConfig(rounds=30, processes=3, max_processes=6)
    files = {"2x": staged["2x"], "dense": staged["dense"], "copy": staged["2x"]}
    asked: list[set[str]] = []

    def never(ratios: Mapping[str, Ratio]) -> bool:
        asked.append(set(ratios))
        return False

    record = compare(files, ENVIRONMENT, config, "dense", decided=never, aside={"copy"})
    assert asked == [{AA, "2x"}] * 3
    assert record.rounds_of_processes == [10] * 6
    assert {timing.name: timing.latency.n for timing in record.variants} == {"dense": 60, "2x": 60, "copy": 30}
    assert StagedWorker.started.count("2x") == 6 + 3
    ordinary = {name for name in ("2x", "copy") if record.variant(name).speedup == pytest.approx(2.0)}
    assert len(ordinary) == 1  # one of the two had the slow process
    assert record.ratio_between("2x", "copy").value != pytest.approx(1.0)


def test_no_process_is_started_after_the_time_limit(staged: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(benchmarking.time, "monotonic", lambda: now[0])
    config = BenchmarkConfig(rounds=30, processes=3, max_processes=6, max_seconds=45)

    def a_second(done: int, total: int) -> None:
        now[0] += 1.0

    record = compare(staged, ENVIRONMENT, config, "dense", a_second, decided=lambda ratios: False)
    assert len(record.rounds_of_processes) == 5


def test_machine_drift_does_not_reach_the_speedup() -> None:
    clock: dict[str, float] = {}

    def slower_every_round(done: int, total: int) -> None:
        clock["speed"] = 1.0 + 0.1 * done

    rounds = benchmarking._interleave(
        scripted([], clock), BenchmarkConfig(rounds=12), slower_every_round, seed=0, unsure=sure
    )
    facts = benchmarking._Facts("2x.onnx", "onnxruntime", "1.0", peak_memory_bytes=1, huge_page_bytes=None)
    timed = benchmarking._Timings(rounds, "dense", [0, 1] * (len(rounds["2x"]) // 2), {"2x": facts})
    result = benchmarking._result(timed, "2x", Workload())
    assert (result.speedup, result.speedup_low, result.speedup_high) == pytest.approx((2.0, 2.0, 2.0))
    assert result.latency.median_ms > 5.0


def test_another_measurement_is_waited_for(staged: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    @contextlib.contextmanager
    def alone(note: Any) -> Iterator[None]:
        done.append("the lock is taken")
        yield
        done.append("and given back")

    def start(*given: Any, **more: Any) -> StagedWorker:
        done.append("started")
        return StagedWorker(*given, **more)

    monkeypatch.setattr(benchmarking, "timing_alone", alone)
    monkeypatch.setattr(benchmarking, "start_worker", start)
    compare(staged, ENVIRONMENT, QUICK, "dense")
    assert (done[0], done[-1]) == ("the lock is taken", "and given back")
    assert len(done) > 4


def test_unknown_baseline_and_no_models(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="found 'denser'"):
        compare(models, ENVIRONMENT, QUICK, "denser")
    with pytest.raises(UsageError, match="no models"):
        compare({}, ENVIRONMENT, QUICK, "dense")


def test_rejected_model_is_named_and_no_worker_is_left(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    load = WorkerHandle.load

    def noting(self: WorkerHandle, model_id: str, path: Path) -> object:
        pids.append(self._process.pid)
        return load(self, model_id, path)

    monkeypatch.setattr(WorkerHandle, "load", noting)
    models["3x"].write_bytes(b"broken")
    with pytest.raises(EngineError, match=r"3x\.onnx"):
        compare(models, ENVIRONMENT, QUICK, "dense")
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_interrupt_leaves_no_worker(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    time_runs = WorkerHandle.time

    def noting(self: WorkerHandle, *arguments: Any, **options: Any) -> list[float]:
        pids.append(self._process.pid)
        return time_runs(self, *arguments, **options)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerHandle, "time", noting)
    with pytest.raises(KeyboardInterrupt):
        compare(models, ENVIRONMENT, QUICK, "dense", interrupt)
    assert len(set(pids)) == 4
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
