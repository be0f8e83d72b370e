"""Latency tables: arithmetic of cells against known truth, which models are timed, refusal of foreign tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from exporters import EmbeddingModel
from tests.helpers.models import IMAGE_TYPES, tiny_inputs, tiny_model
from ziplm_deploy.engines import Engine, WorkerHandle
from ziplm_deploy.errors import EngineError, EnvironmentMismatchError, IncompatibleArtifactError, UnsupportedModelError
from ziplm_deploy.latency import models as profiling_models
from ziplm_deploy.latency import profile as profiling
from ziplm_deploy.latency.cells import Samples, cells_of, noise_of, non_monotone, unsure, wholes_of
from ziplm_deploy.latency.grid import Grid, cell_id
from ziplm_deploy.latency.models import first_layers, random_stack
from ziplm_deploy.latency.profile import Workers, measure_table
from ziplm_deploy.latency.request import TableRequest, check_table
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.deployed import FLOAT32, Treatment
from ziplm_deploy.models.modules import layers_of, model_shape
from ziplm_deploy.recipe import Environment, ExportConfig, ProfileConfig, Variant, Workload

ENVIRONMENT = Environment(workload=Workload(batch_size=2, seq_len=12))
QUICK = ProfileConfig(min_rounds=3, max_rounds=3, max_seconds=20, width_ratio=0.4, stack_depth=2)
HIDDEN = ("last_hidden_state",)
# Positions in every layer's scores, in its projections, rotary with masks of two kinds, images with scaled layers.
PROFILED = (
    "modernbert",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("deberta-v2", "distilbert", "mpnet", "dinov2")),
)


def request(dense: nn.Module | None = None, **changes: Any) -> TableRequest:
    fields = {"output_names": HIDDEN, "environment": ENVIRONMENT, "profile": QUICK, "export": ExportConfig()}
    return TableRequest(**{"dense": dense or tiny_model("bert"), **fields, **changes})


@pytest.fixture(scope="module")
def measured() -> tuple[LatencyTable, dict[WorkerHandle, list[str]]]:
    """A table, and the models that each of its workers had loaded."""
    held: dict[WorkerHandle, list[str]] = {}
    load = WorkerHandle.load

    def recorded(self: WorkerHandle, model_id: str, path: Path) -> Any:
        held.setdefault(self, []).append(model_id)
        return load(self, model_id, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerHandle, "load", recorded)
        return measure_table(request()), held


@pytest.fixture(scope="module")
def table(measured: tuple[LatencyTable, dict[WorkerHandle, list[str]]]) -> LatencyTable:
    return measured[0]


def test_table_holds_every_size_with_intervals(table: LatencyTable, tmp_path: Path) -> None:
    assert table.sizes("attention") == [0, 1, 2, 3, 4]
    assert table.sizes("ffn") == [0, 8, 24, 64]
    assert table.latency_ms("attention", 0) == table.latency_ms("ffn", 0)
    for cell in table.cells:
        assert 0 < cell.timing.low_ms <= cell.timing.high_ms
        assert cell.timing.n >= 3
    assert table.dense.median_ms > table.base.median_ms > 0
    assert table.noise["rounds"] == 3
    assert table.total_seconds > table.measuring_seconds > 0
    assert table.noise["sum_of_parts_over_dense"] == pytest.approx(table.sum_dense_ms() / table.dense.median_ms)
    assert (table.variant, table.form, table.unpruned) == ("fp32", "", None)
    assert (table.baseline_engine, table.baseline_engine_version) == (table.engine, table.engine_version)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("model_type", PROFILED)
def test_architectures_of_other_layers_than_berts_can_be_profiled(model_type: str) -> None:
    few = QUICK.model_copy(update={"width_ratio": 0.31})
    names = ("logits",) if model_type in IMAGE_TYPES else HIDDEN
    done: list[tuple[int, int]] = []
    asked = request(tiny_model(model_type, num_attention_heads=2), profile=few, output_names=names)
    table = measure_table(asked, lambda step, total: done.append((step, total)))
    assert table.shape.model_type == model_type
    assert table.sizes("attention") == [0, 1, 2]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]


def test_whole_models_have_processes_of_their_own_and_cells_share_one(
    measured: tuple[LatencyTable, dict[WorkerHandle, list[str]]],
) -> None:
    _, held = measured
    together = {worker: ids for worker, ids in held.items() if len(ids) > 1}
    alone = sorted(ids[0] for worker, ids in held.items() if worker not in together)
    assert alone == [name for name in ("dense", "whole 0", "whole 1", "whole 2", "whole 3") for _ in range(3)]
    assert [worker.options.shared_arena for worker in together] == [True]


@pytest.mark.usefixtures("one_process")
def test_wrapped_and_static() -> None:
    asked = request(
        export=ExportConfig(shapes="static"),
        output_names=("last_hidden_state", "sentence_embedding"),
        wrap=lambda model: EmbeddingModel(model, "mean", True),
    )
    table = measure_table(asked)
    check_table(table, asked)
    assert table.shapes == "static"


def test_dense_model_is_not_changed_by_taking_its_layers_away() -> None:
    dense = tiny_model("bert")
    base = first_layers(dense, 0)
    assert len(layers_of(dense)) == 3
    assert len(layers_of(base)) == 0
    assert base(**tiny_inputs(dense)).last_hidden_state.shape == (2, 9, 32)


def test_stack_has_its_depth_and_a_tiny_vocabulary() -> None:
    dense = tiny_model("distilbert", vocab_size=5000)
    stack = random_stack(dense.config, depth=5)
    assert len(layers_of(stack)) == 5
    assert stack.config.vocab_size == profiling_models.TINY_VOCABULARY
    assert dense.config.vocab_size == 5000
    assert stack(**tiny_inputs(stack)).last_hidden_state.shape == (2, 9, 32)


def truth_ms(kind: str, size: int) -> float:
    return 0.1 + (0.8 * size if kind == "attention" else 0.005 * size)


class FormulaWorker:
    """A perfectly additive machine: latency from the model id, with noise and phases of lower speed."""

    def __init__(self, seed: int, noise: float = 0.01, slow: float = 1.4) -> None:
        self.generator = np.random.default_rng(seed)
        self.noise, self.slow, self.runs = noise, slow, 0

    def latency_ms(self, model_id: str) -> float:
        fixed = {"none": 0.3, "base": 0.9, "dense": 0.9 + 12 * (truth_ms("attention", 4) + truth_ms("ffn", 64))}
        if model_id in fixed:
            return fixed[model_id]
        if model_id == "both dropped":
            return 0.3 + 4 * 0.2
        kind, size = model_id.split()
        return 0.3 + 4 * (truth_ms(kind, int(size)) + 0.1)

    def time_many(self, order: list[tuple[str, int]], warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        samples = []
        for model_id, _ in order:
            self.runs += 1
            speed = self.slow if self.runs // 25 % 2 else 1.0
            samples.append(self.latency_ms(model_id) * speed * self.generator.lognormal(0, self.noise))
        return samples

    def warm_up(self, model_id: str) -> None:
        self.time_many([(model_id, 0)])


def measured_by_formula(profile: ProfileConfig, **machine: Any) -> tuple[Samples, dict[tuple[str, int], Any]]:
    shape = model_shape(tiny_model("bert").config).model_copy(update={"n_layers": 12})
    worker: Any = FormulaWorker(seed=0, **machine)
    grid = Grid(shape, profile)
    samples = Samples()
    profiling._measure(worker, ["dense", "base", "none", *grid.cell_ids], samples, grid, lambda rounds: None, seed=0)
    profiling._remeasure(worker, samples, grid, seed=0)
    cells = cells_of(samples, grid)
    return samples, {(cell.kind, cell.size): cell.timing for cell in cells}


def test_cells_recover_the_truth_on_a_machine_that_changes_its_speed() -> None:
    profile = ProfileConfig(min_rounds=30, max_rounds=60, precision=0.004)
    samples, cells = measured_by_formula(profile)
    fast_over_truth = samples.ms["dense"]
    scale = float(np.median(fast_over_truth)) / FormulaWorker(0).latency_ms("dense")  # median speed of the machine
    for (kind, size), timing in cells.items():
        if size:
            assert timing.median_ms / scale == pytest.approx(truth_ms(kind, size), rel=0.04)
            assert timing.low_ms <= timing.median_ms <= timing.high_ms
    assert noise_of(samples)["speed_drift_p90_over_p10"] == pytest.approx(1.4, rel=0.1)


def test_exact_machine_gives_exact_cells_and_stops_early() -> None:
    samples, cells = measured_by_formula(ProfileConfig(), noise=0.0, slow=1.0)
    assert samples.rounds == ProfileConfig().min_rounds
    assert samples.remeasured == 0
    for (kind, size), timing in cells.items():
        assert timing.median_ms == pytest.approx(truth_ms(kind, size))


def test_noisy_cells_are_measured_again() -> None:
    profile = ProfileConfig(min_rounds=4, max_rounds=4, precision=0.001)
    samples, _ = measured_by_formula(profile, noise=0.2)
    assert samples.rounds == 4
    assert samples.remeasured > 0
    assert max(len(ms) for ms in samples.ms.values()) > 4


def test_smaller_cell_that_looks_slower_is_suspicious_with_its_neighbour() -> None:
    grid = Grid(model_shape(tiny_model("bert").config), QUICK)
    samples, ids = Samples(), grid.cell_ids
    samples.of_calls = {model_id: np.full((1, 5), float(len(ids) - place)) for place, model_id in enumerate(ids)}
    samples.of_calls["both dropped"] = np.full((1, 5), 0.1)
    assert non_monotone(samples, grid) == []
    samples.of_calls["ffn 24"] = samples.of_calls["ffn 64"] + 1.0
    assert non_monotone(samples, grid) == ["ffn 64", "ffn 24"]


def test_time_limit_still_gives_a_median() -> None:
    samples, _ = measured_by_formula(ProfileConfig(max_seconds=1e-9))
    assert samples.rounds == 3


class Proxy:
    """A second worker on the same machine."""

    def __init__(self, machine: FormulaWorker) -> None:
        self.time_many = machine.time_many


def test_two_workers_are_timed_in_the_order_that_one_would_be() -> None:
    order = [(name, 0) for name in ("dense", "base", "none", "dense", "dense", "base")]
    alone = FormulaWorker(seed=1)
    machine = FormulaWorker(seed=1)
    cells: Any = Proxy(machine)
    reference: Any = Proxy(machine)
    workers = Workers({"dense": [reference], "base": [cells], "none": [cells]})
    assert workers.time_many(order * 20) == alone.time_many(order * 20)


class Placed:
    """A process whose place in memory alone tells how fast it is."""

    def __init__(self, ms: float) -> None:
        self.ms, self.loaded = ms, 0

    def load(self, model_id: str, path: Path) -> None:
        self.loaded += 1

    def time_many(self, order: list[tuple[str, int]], warmup: int = 1, warmup_ms: float = 0.0) -> list[float]:
        return [self.ms] * len(order)


def test_processes_of_a_whole_model_take_turns() -> None:
    places: Any = [Placed(1.0), Placed(1.1), Placed(0.9)]
    cells: Any = Placed(0.2)
    workers = Workers({"dense": places, "base": [cells]})
    workers.load("dense", Path("dense.onnx"))
    assert [place.loaded for place in places] == [1, 1, 1]
    dense, base = ("dense", 0), ("base", 0)
    assert workers.time_many([dense, base, dense, dense, dense]) == [1.0, 0.2, 1.1, 0.9, 1.0]
    assert workers.time_many([base, dense]) == [0.2, 1.1]


@pytest.mark.parametrize(("gigabytes", "expected"), [(64, 3), (0.5, 1), (0.001, 1)])
def test_small_machines_hold_fewer_processes_of_whole_models(gigabytes: float, expected: int) -> None:
    assert profiling._whole_processes(tiny_model("bert"), int(gigabytes * 2**30)) == expected


def test_the_unpruned_model_says_what_is_negligible() -> None:
    grid = Grid(model_shape(tiny_model("bert").config), ProfileConfig())
    noisy = np.array([[5.0, 10.0, 15.0, 20.0]]) / 100
    levels = {"dense": 1e6, "unpruned": 12.0, "base": 1.0}
    samples = Samples(of_calls={model_id: np.full((1, 4), ms) for model_id, ms in levels.items()})
    samples.of_calls["ffn 64"] = noisy
    assert unsure(samples, grid) == ["ffn 64"]  # not negligible in 12 ms, though it is in the dense 1000 s
    del samples.of_calls["unpruned"]
    assert unsure(samples, grid) == []


def cells_in(sizes: dict[str, int]) -> set[str]:
    return {cell_id(name.split(".")[1], size) for name, size in sizes.items()}


def test_whole_models_of_refused_cells_are_left_out() -> None:
    grid = Grid(model_shape(tiny_model("bert").config), QUICK)
    sizes = grid.pruned_samples
    samples = Samples(of_calls={model_id: np.full((1, 3), 2.0) for model_id in [*sizes, *grid.cell_ids]})
    assert [whole.sizes for whole in wholes_of(samples, grid)] == list(sizes.values())
    refused = next(model_id for model_id in sorted(cells_in(sizes["whole 0"])) if model_id != "both dropped")
    del samples.of_calls[refused], samples.of_calls["whole 3"]
    left = [whole.sizes for whole in wholes_of(samples, grid)]
    assert sizes["whole 0"] not in left
    assert sizes["whole 3"] not in left
    assert not any(refused in cells_in(sizes) for sizes in left)


def test_own_table_is_accepted(table: LatencyTable) -> None:
    check_table(table, request())
    other = {"variant": "sparse", "form": "80% zeros"}
    zeros = Treatment(Variant.SPARSE, lambda model: model, lambda path, inputs: None, "80% zeros")
    check_table(table.model_copy(update=other), request(treatment=zeros))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("environment", ENVIRONMENT.model_copy(update={"engine": "openvino"}), "engine: expected openvino, found onnx"),
        (
            "environment",
            Environment(workload=Workload(batch_size=3, seq_len=12)),
            "environment: expected onnxruntime, batch 3",
        ),
        (
            "dense",
            tiny_model("bert", vocab_size=61),
            "graph: expected .* vocabulary 61, .*found BertModel",
        ),
        ("output_names", ("sentence_embedding",), "outputs sentence_embedding, found .* outputs last_hidden_state"),
        ("treatment", replace(FLOAT32, variant=Variant.INT8), "variant: expected int8, found fp32"),
        ("treatment", replace(FLOAT32, description="80% zeros"), "form: expected 80% zeros, found "),
        ("baseline_engine", "openvino", "baseline engine: expected openvino, found onnxruntime"),
        ("export", ExportConfig(shapes="static"), "export shapes: expected static, found dynamic"),
        ("export", ExportConfig(opset=18), "opset: expected 18, found 17"),
    ],
)
def test_other_use_is_refused_even_if_foreign_tables_are_allowed(
    table: LatencyTable, field: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "version", lambda self: "1.0")  # the extra openvino may be missing
    for allow in (False, True):
        with pytest.raises(IncompatibleArtifactError, match=message):
            check_table(table, request(**{field: value}), allow_foreign=allow)


def test_other_machine_and_version_are_refused_unless_allowed(table: LatencyTable) -> None:
    elsewhere = table.machine.model_copy(update={"cpu_model": "Z80"})
    other = table.model_copy(update={"machine": elsewhere, "engine_version": "0.0.1"})
    with pytest.raises(IncompatibleArtifactError, match=r"(?s)machine: .*found Z80.*engine version: .*found 0\.0\.1"):
        check_table(other, request())
    check_table(other, request(), allow_foreign=True)
    reference = table.model_copy(update={"baseline_engine_version": "0.0.2"})
    with pytest.raises(IncompatibleArtifactError, match=r"baseline engine version: .*found 0\.0\.2"):
        check_table(reference, request())
    check_table(reference, request(), allow_foreign=True)


def test_other_model_shape_and_missing_cells_are_refused(table: LatencyTable) -> None:
    wider = request(tiny_model("bert", intermediate_size=128))
    with pytest.raises(
        IncompatibleArtifactError, match=r"(?s)model shape: .*ffn of size 128: expected a measured cell"
    ):
        check_table(table, wider)
    thinned = table.model_copy(update={"cells": [cell for cell in table.cells if cell.size]})
    with pytest.raises(IncompatibleArtifactError, match="attention of size 0"):
        check_table(thinned, request())


def test_unsupported_model_and_too_long_sequences_are_refused() -> None:
    dense = tiny_model("bert")
    dense.config.is_decoder = True
    with pytest.raises(UnsupportedModelError, match="decoder"):
        measure_table(request(dense))
    with pytest.raises(UnsupportedModelError, match="seq_len <= 40"):
        measure_table(request(environment=Environment(workload=Workload(seq_len=41))))
    with pytest.raises(UnsupportedModelError, match="logits"):
        measure_table(request(output_names=("logits",)))


def test_too_many_threads_are_refused_before_any_export() -> None:
    with pytest.raises(EnvironmentMismatchError):
        measure_table(request(environment=Environment(threads=4000)))


def test_worker_that_dies_ends_the_profile_with_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    load = WorkerHandle.load

    def dying(self: WorkerHandle, model_id: str, path: Path) -> Any:
        if model_id == "attention 2":
            self._process.kill()
        return load(self, model_id, path)

    monkeypatch.setattr(WorkerHandle, "load", dying)
    with pytest.raises(EngineError, match=r"(?s)attention-2\.onnx.*SIGKILL"):
        measure_table(request())
