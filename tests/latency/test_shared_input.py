"""What layers share, such as MPNet's position bias, is computed once a model: in the base of a table, in no cell."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from torch import nn

from tests.helpers.models import tiny_inputs, tiny_model
from ziplm_deploy.latency.grid import BASE, DENSE, NO_LAYERS
from ziplm_deploy.latency.models import random_stack, table_models
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.models.architectures import ARCHITECTURES
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.recipe import Environment, ExportConfig, ProfileConfig, Workload

KINDS = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
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


@pytest.mark.parametrize("model_type", [pytest.param("deberta-v2", marks=pytest.mark.slow), "t5"])
def test_every_model_of_a_table_computes_the_mask_of_scores_once(model_type: str, tmp_path: Path) -> None:
    found = graphs(model_type, tmp_path)
    counted = {
        model_id: sum(node.name.endswith("/encoder/Sub") for node in graph.node)
        for model_id, graph in found.items()
        if not model_id.startswith("whole")
    }
    assert {BASE, NO_LAYERS, "both dropped", "attention 1"} < counted.keys()
    assert counted == dict.fromkeys(counted, 1)


@pytest.mark.slow
def test_every_model_of_a_table_computes_masks_and_rotary_positions_once(tmp_path: Path) -> None:
    """The window of local attention takes one Abs; each of the two kinds of attention has cosines of its own."""
    found = graphs("modernbert", tmp_path)
    parts = {model_id: graph for model_id, graph in found.items() if not model_id.startswith("whole")}
    operators = {model_id: Counter(node.op_type for node in graph.node) for model_id, graph in parts.items()}
    assert {BASE, DENSE, NO_LAYERS, "both dropped", "attention 1", "ffn 64"} < operators.keys()
    assert {model_id: counted["Abs"] for model_id, counted in operators.items()} == dict.fromkeys(operators, 1)
    if "position_embeddings" in ARCHITECTURES["modernbert"].shared_inputs:  # before transformers 5 by each layer
        assert {model_id: counted["Cos"] for model_id, counted in operators.items()} == dict.fromkeys(operators, 2)


def test_a_stack_has_a_norm_before_each_attention_and_both_kinds_of_it() -> None:
    """ModernBERT's first attention has none: of few layers that would be a larger share than of the model's."""
    stack: Any = random_stack(tiny_model("modernbert").config, depth=5)
    assert all(isinstance(layer.attn_norm, nn.LayerNorm) for layer in layers_of(stack))
    types = getattr(stack.config, "layer_types", None)
    assert types is None or types == KINDS
    assert stack(**tiny_inputs(stack)).last_hidden_state.shape == (2, 9, 32)


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_others_share_nothing_between_layers(model_type: str, tmp_path: Path) -> None:
    dense = tiny_model(model_type)
    request = TableRequest(dense, ("last_hidden_state",), Environment(), QUICK, ExportConfig())
    assert "in the base" not in request.graph
    models = {model.model_id: model for model in table_models(request)}
    before = [type(module) for module in models[NO_LAYERS].build().modules()]
    assert not any(kind.__name__ == "_Reader" for kind in before)
