"""What layers share, such as MPNet's position bias, is computed once a model: in the base of a table, in no cell."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.helpers.models import tiny_model
from ziplm_deploy.latency.grid import BASE, DENSE, NO_LAYERS
from ziplm_deploy.latency.models import table_models
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.recipe import Environment, ExportConfig, ProfileConfig, Workload

QUICK = ProfileConfig(stack_depth=2, width_ratio=0.5)


def graphs(model_type: str, folder: Path) -> dict[str, onnx.GraphProto]:
    environment = Environment(workload=Workload(seq_len=8))
    dense = tiny_model(model_type, num_hidden_layers=3)
    request = TableRequest(dense, ("last_hidden_state",), environment, QUICK, ExportConfig())
    found = {}
    for model in table_models(request):
        path = folder / f"{len(found)}.onnx"
        model.export(path, request.settings, request.form)
        found[model.model_id] = onnx.load(str(path)).graph
    return found


def biases(graph: onnx.GraphProto) -> int:
    """How often the bias of positions is looked up."""
    return sum(
        node.op_type == "Gather" and any("relative_attention_bias" in name for name in node.input)
        for node in graph.node
    )


def test_every_model_of_a_table_computes_the_bias_once(tmp_path: Path) -> None:
    found = graphs("mpnet", tmp_path)
    assert {BASE, DENSE, NO_LAYERS, "both dropped", "attention 1"} < found.keys()
    counted = {model_id: biases(graph) for model_id, graph in found.items() if not model_id.startswith("whole")}
    assert counted == dict.fromkeys(counted, 1)


@pytest.mark.parametrize("model_type", ["deberta-v2", "t5"])
def test_every_model_of_a_table_computes_the_mask_of_scores_once(model_type: str, tmp_path: Path) -> None:
    found = graphs(model_type, tmp_path)
    counted = {
        model_id: sum(node.name.endswith("/encoder/Sub") for node in graph.node)
        for model_id, graph in found.items()
        if not model_id.startswith("whole")
    }
    assert {BASE, NO_LAYERS, "both dropped", "attention 1"} < counted.keys()
    assert counted == dict.fromkeys(counted, 1)


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_others_share_nothing_between_layers(model_type: str, tmp_path: Path) -> None:
    dense = tiny_model(model_type)
    request = TableRequest(dense, ("last_hidden_state",), Environment(), QUICK, ExportConfig())
    assert "in the base" not in request.graph
    models = {model.model_id: model for model in table_models(request)}
    before = [type(module) for module in models[NO_LAYERS].build().modules()]
    assert not any(kind.__name__ == "_Reader" for kind in before)
