"""Tables in llama.cpp: arithmetic of its cells, which files are timed, and predictions beside measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.models import tiny_causal_model, tiny_model
from ziplm_deploy.errors import IncompatibleArtifactError, UnsupportedModelError, UsageError
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.latency.cells import Samples, cells_of
from ziplm_deploy.latency.grid import Grid
from ziplm_deploy.latency.models import table_models
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.request import TableRequest, check_table
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.deployed import FLOAT32
from ziplm_deploy.models.gguf_export import write_to_be_timed
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.recipe import BenchmarkConfig, Environment, ExportConfig, GgufType, ProfileConfig, Workload

ENVIRONMENT = Environment(engine="llamacpp", workload=Workload(prefill=8, decode=4))
LAYERS = 4
QUICK = ProfileConfig(min_rounds=3, max_rounds=3, max_seconds=20, width_ratio=0.5, stack_depth=2, stack_megabytes=0.0)


def request(file_type: GgufType | None = "Q8_0", **changes: Any) -> TableRequest:
    fields: dict[str, Any] = {
        "dense": tiny_causal_model("llama", hidden_size=64, intermediate_size=96),
        "output_names": ("logits",),
        "environment": ENVIRONMENT,
        "profile": QUICK,
        "export": ExportConfig(gguf=file_type),
    }
    return TableRequest(**{**fields, **changes})


def needs_llama_cpp() -> None:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    pytest.importorskip("xllamacpp", reason="runs GGUF files; in the extra llamacpp")


def truth_ms(kind: str, size: int) -> float:
    return (0.7 if kind == "attention" else 0.01) * size


def test_attention_is_timed_beside_the_smallest_ffn_whose_own_cell_is_taken_away() -> None:
    shape = model_shape(tiny_model("bert").config)  # 4 heads, FFN 64
    grid = Grid(shape, ProfileConfig(width_align=32, width_ratio=0.5, stack_depth=3), attention_has_ffn=True)
    assert grid.cell_sizes == {"attention": [4, 3, 2, 1, 0], "ffn": [64, 32, 0]}
    assert [grid.beside("attention", size) for size in (4, 1, 0)] == [32, 32, 0]
    assert grid.beside("ffn", 64) == 0
    samples = Samples()
    samples.of_calls = {name: np.full((1, 9), 0.4) for name in ("none", "both dropped")}
    for name, (kind, size) in grid.cell_ids.items():
        if size:
            layer_ms = truth_ms(kind, size) + truth_ms("ffn", grid.beside(kind, size))
            samples.of_calls[name] = np.full((1, 9), 0.4 + 3 * layer_ms)
    for cell in cells_of(samples, grid):
        if cell.size:
            assert cell.timing.median_ms == pytest.approx(truth_ms(cell.kind, cell.size))
            assert cell.timing.low_ms == pytest.approx(cell.timing.high_ms)


def test_noise_of_the_ffn_beside_attention_is_in_the_interval_of_attention() -> None:
    grid = Grid(model_shape(tiny_model("bert").config), ProfileConfig(width_align=32), attention_has_ffn=True)
    samples, generator = Samples(), np.random.default_rng(0)
    samples.of_calls = {name: np.full((1, 40), 1.0) for name in ("none", "both dropped", *grid.cell_ids)}
    samples.of_calls["ffn 32"] = generator.normal(2.0, 0.1, (1, 40))
    samples.of_calls["attention 4"] = np.full((1, 40), 9.0)
    attention = next(cell.timing for cell in cells_of(samples, grid) if (cell.kind, cell.size) == ("attention", 4))
    assert attention.high_ms - attention.low_ms > 0.001


@pytest.mark.parametrize(("file_type", "value_bytes"), [("F16", 2.0), ("Q8_0", 34 / 32), ("Q4_0", 18 / 32)])
def test_a_request_is_of_one_type_of_weights_and_of_whole_blocks(file_type: GgufType, value_bytes: float) -> None:
    asked = request(file_type, profile=QUICK.model_copy(update={"stack_megabytes": None}))
    assert asked.grid.cell_sizes["ffn"] == [96, 64, 32, 0]
    assert asked.grid.structure_bytes["ffn"] == 3 * 64 * value_bytes
    assert asked.grid.structure_bytes["attention"] == 2 * 3 * 16 * 64 * value_bytes
    assert asked.served.description.startswith(f"{file_type} weights")
    assert not asked.times_dense_as_served
    assert "GGUF, deci cache" in asked.graph
    assert all(model.treatment is asked.served for model in table_models(asked))
    assert request(environment=Environment(workload=ENVIRONMENT.workload)).served is FLOAT32


def test_a_request_must_say_which_weights() -> None:
    with pytest.raises(UsageError, match=r"expected a type of weights for files of llama\.cpp"):
        request(None).grid  # noqa: B018


def layers_in(path: Path) -> dict[str, list[int]]:
    import gguf

    fields = gguf.GGUFReader(path).fields
    names = {"ffn": "feed_forward_length", "query": "attention.head_count", "cached": "attention.head_count_kv"}
    return {short: [int(value) for value in fields[f"deci.{name}"].contents()] for short, name in names.items()}


def test_files_of_cells_have_the_layers_that_their_names_say(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writes GGUF files; in the extra llamacpp")
    asked, found = request(), {}
    for model in table_models(asked):
        path = tmp_path / f"{model.model_id}.gguf"
        model.export(path, asked.settings, asked.form)
        found[model.model_id] = layers_in(path)
    assert found["attention 2"] == {"ffn": [32, 32], "query": [4, 4], "cached": [2, 2]}
    assert found["attention 1"] == {"ffn": [32, 32], "query": [2, 2], "cached": [1, 1]}
    assert found["ffn 64"] == {"ffn": [64, 64], "query": [1, 0], "cached": [1, 0]}  # the first has heads of zeros
    assert found["dense"] == {"ffn": [96] * 3, "query": [4] * 3, "cached": [2] * 3}
    assert found["none"] == found["both dropped"] == found["base"] == {"ffn": [32], "query": [1], "cached": [1]}


@pytest.mark.parametrize(
    ("dense", "text"),
    [
        (lambda: tiny_model("bert"), "expected a causal language model, found a bert"),
        (lambda: tiny_causal_model("qwen3", hidden_size=64), "found: expected queries and keys without norms"),
    ],
)
def test_other_models_have_no_table_in_llama_cpp(dense: Callable[[], Any], text: str, tmp_path: Path) -> None:
    asked = request(dense=dense())
    first = next(table_models(asked))
    with pytest.raises(UnsupportedModelError, match=text):
        first.export(tmp_path / "dense.gguf", asked.settings, asked.form)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    needs_llama_cpp()
    return measured_table()


def measured_table() -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ziplm_deploy.latency.profile.WHOLE_PROCESSES", 1)
        return measure_table(request(dense=larger()))


def larger() -> Any:
    """Large enough for its layers, and not the server around them, to take the time."""
    return tiny_causal_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS)


@pytest.mark.slow
def test_a_table_is_measured_call_by_call(table: LatencyTable, tmp_path: Path) -> None:
    assert (table.engine, table.variant, table.baseline_engine) == ("llamacpp", "gguf", "llamacpp")
    assert (table.form, table.unpruned) == ("Q8_0 weights, Q8_0 embedding and head", None)
    assert table.sizes("attention") == [0, 1, 2]
    assert all(size % 32 == 0 for size in table.sizes("ffn"))
    for timing in (table.dense, table.base, *(cell.timing for cell in table.cells)):
        assert len(timing.of_calls) == 3
        assert timing.low_ms <= timing.median_ms <= timing.high_ms
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


@pytest.mark.slow
def test_a_table_of_other_weights_does_not_fit(table: LatencyTable) -> None:
    check_table(table, request(dense=larger()))
    with pytest.raises(IncompatibleArtifactError, match=r"form: expected Q4_0 weights, .*found Q8_0 weights"):
        check_table(table, request("Q4_0", dense=larger()))


@pytest.mark.slow
def test_predictions_are_near_what_random_models_take(table: LatencyTable, tmp_path: Path) -> None:
    """Far from the precision of real tables: three rounds, and models of a millisecond, on a machine that may be busy
    in one of three tries."""
    dense, generator = larger(), np.random.default_rng(3)
    sizes = {
        f"{layer}.{kind}": int(generator.choice(table.sizes(kind)))  # type: ignore[arg-type]
        for layer in range(LAYERS)
        for kind in ("attention", "ffn")
    }
    files = {"dense": tmp_path / "dense.gguf", "pruned": tmp_path / "pruned.gguf"}
    write_to_be_timed(dense, files["dense"], "Q8_0")
    write_to_be_timed(random_resized(dense, sizes), files["pruned"], "Q8_0")
    config = BenchmarkConfig(rounds=5, processes=2, max_processes=2, max_seconds=10)
    tried: list[tuple[float, float]] = []
    for again in (False, True, True):
        known = measured_table() if again else table
        measured = compare(files, ENVIRONMENT, config, "dense").variant("pruned").speedup
        tried.append((known.dense.median_ms / known.predict_ms(sizes), measured))
        if tried[-1][0] > 1.1 and tried[-1][0] == pytest.approx(measured, rel=0.35):
            return
    pytest.fail(f"predicted and measured: {tried}")
