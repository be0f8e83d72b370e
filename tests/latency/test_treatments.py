"""Tables of treated files: what is compressed, what stays dense and float, and on which engine each runs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from tests.helpers.models import tiny_model
from ziplm_deploy.engines import Engine, WorkerHandle, get_engine
from ziplm_deploy.engines.trial import ModelRefusedError, Trial
from ziplm_deploy.errors import EngineError
from ziplm_deploy.latency.models import TableModel, table_models
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.deployed import FLOAT32, Treatment
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.recipe import Environment, ExportConfig, ProfileConfig, Variant, Workload

ENVIRONMENT = Environment(workload=Workload(batch_size=2, seq_len=12))
QUICK = ProfileConfig(min_rounds=3, max_rounds=3, max_seconds=20, width_ratio=0.4, stack_depth=2)
HIDDEN = ("last_hidden_state",)


def request(dense: nn.Module, environment: Environment = ENVIRONMENT, **changes: Any) -> TableRequest:
    return TableRequest(dense, HIDDEN, environment, QUICK, **{"export": ExportConfig(), **changes})


def zero_half(model: nn.Module) -> nn.Module:
    """Zero every other column of those that are left: 50 % the first time, 75 % the second."""
    with torch.no_grad():
        for linear in layer_linears(model):
            linear.weight[:, linear.weight.abs().sum(0).nonzero()[::2, 0]] = 0
    return model


def layer_linears(model: nn.Module) -> list[nn.Linear]:
    return [part for layer in layers_of(model) for part in layer.modules() if isinstance(part, nn.Linear)]


HALF_ZERO = Treatment(Variant.SPARSE, zero_half, lambda path, inputs: None, "every other column is zero")


def zero_shares(model: TableModel) -> list[float]:
    return [
        float((linear.weight == 0).float().mean()) for linear in layer_linears(model.build()) if linear.weight.numel()
    ]


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_a_treatment_reaches_every_model_but_the_dense_reference(model_type: str) -> None:
    dense = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    models = list(table_models(request(dense, treatment=HALF_ZERO)))
    wholes = [f"whole {index}" for index in range(4)]
    assert [model.model_id for model in models[:9]] == ["dense", "unpruned", *wholes, "base", "none", "attention 4"]
    for model in models * 2:  # a treatment that changes a model in place must not meet its own zeros again
        expected = 0.0 if model.model_id == "dense" else 0.5
        assert all(share == pytest.approx(expected, abs=0.01) for share in zero_shares(model)), model.model_id
        assert (model.treatment is FLOAT32) == (model.model_id == "dense")
    assert len(zero_shares(models[1])) == 3 * 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def to_int8(path: Path, inputs: Any) -> None:
    """Dynamic INT8 in place, where there is something to quantize."""
    assert {"input_ids", "attention_mask"} <= set(inputs)
    quantize_dynamic(path, path, op_types_to_quantize=["MatMul"], extra_options={"MatMulConstBOnly": True})


def smallest() -> nn.Module:
    """One layer with few sizes: for tests that start several engines."""
    return tiny_model("bert", num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def loaded_models(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, onnx.ModelProto]]:
    """Filled by every load: model id to (version of its engine, what was loaded)."""
    load, seen = WorkerHandle.load, {}

    def noting(self: WorkerHandle, model_id: str, path: Path) -> Any:
        self.wait_until_ready()
        found = self.version, onnx.load(path)
        assert seen.setdefault(model_id, found) == found  # in each of its processes the same
        return load(self, model_id, path)

    monkeypatch.setattr(WorkerHandle, "load", noting)
    return seen


def test_cells_are_timed_as_finished_files_against_a_dense_float_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = loaded_models(monkeypatch)
    int8 = Treatment(Variant.INT8, lambda model: model, to_int8, "dynamic")
    table = measure_table(request(smallest(), treatment=int8))
    integers = {
        model_id: sum(node.op_type == "MatMulInteger" for node in model.graph.node)
        for model_id, (_, model) in seen.items()
    }
    depth = QUICK.stack_depth
    assert (integers["dense"], integers["unpruned"]) == (0, 6)  # query, key, value, output; up, down
    assert (integers["attention 2"], integers["ffn 16"]) == (4 * depth, 2 * depth)
    assert integers["base"] == integers["none"] == integers["both dropped"] == 0
    assert (table.variant, table.form, table.baseline_engine) == ("int8", "dynamic", "onnxruntime")
    assert table.unpruned is not None
    parts = table.noise["sum_of_parts_over_dense"]
    assert parts == pytest.approx(table.sum_dense_ms() / table.unpruned.median_ms)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_the_dense_model_may_be_timed_on_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    version = pytest.importorskip("openvino", reason="the extra openvino is not installed").__version__.split("-")[0]
    seen = loaded_models(monkeypatch)
    environment = ENVIRONMENT.model_copy(update={"engine": "openvino"})
    table = measure_table(request(smallest(), environment, baseline_engine="onnxruntime"))
    assert (table.engine, table.engine_version) == ("openvino", version)
    assert (table.baseline_engine, table.baseline_engine_version) == ("onnxruntime", onnxruntime.__version__)
    assert {model_id for model_id, (version_, _) in seen.items() if version_ == onnxruntime.__version__} == {"dense"}
    assert table.variant == "fp32"
    assert table.unpruned is not None  # the same file on the engine of the cells, to check their sum against
    assert seen["unpruned"][1] == seen["dense"][1]


@pytest.mark.slow
def test_cells_on_deepsparse_against_onnx_runtime() -> None:
    try:
        version = get_engine("deepsparse").version()
    except EngineError as missing:
        pytest.skip(str(missing))
    static = ExportConfig(shapes="static", opset=16)
    environment = ENVIRONMENT.model_copy(update={"engine": "deepsparse"})
    table = measure_table(
        request(smallest(), environment, export=static, treatment=HALF_ZERO, baseline_engine="onnxruntime")
    )
    assert (table.engine, table.engine_version) == ("deepsparse", version)
    assert (table.variant, table.baseline_engine) == ("sparse", "onnxruntime")


@pytest.mark.usefixtures("one_process")
def test_cells_that_the_engine_refuses_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Engine, "may_abort", True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trials: list[str] = []

    def load(self: Trial, path: Path) -> None:
        trials.append(path.stem)
        if path.stem == "ffn-24":
            raise ModelRefusedError(f"assertion failed: {path}")

    monkeypatch.setattr(Trial, "run", load)
    table = measure_table(request(tiny_model("bert")))
    assert set(table.refused) == {"ffn 24"}
    assert table.refused["ffn 24"].endswith("assertion failed: ffn-24.onnx")
    assert not list(tmp_path.glob("ziplm-refused-*"))  # nobody would remove a copy
    assert 24 not in table.sizes("ffn")
    assert {0, 64} <= set(table.sizes("ffn"))
    assert len(trials) == len(set(trials)) > len(table.cells) - 2


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "needed",
    [
        "dense",
        "base",
        "attention-4",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("both-dropped", "ffn-64")),
    ],
)
def test_a_table_needs_its_references(needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "may_abort", True)

    def load(self: Trial, path: Path) -> None:
        if path.stem == needed:
            raise ModelRefusedError("assertion failed")

    monkeypatch.setattr(Trial, "run", load)
    with pytest.raises(EngineError, match="assertion failed"):
        measure_table(request(tiny_model("bert")))
