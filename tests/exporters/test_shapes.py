"""Constant shapes of a graph: the same answers with fewer nodes, and only where positions rotate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import exporters.encoder
from exporters import ExportSettings, dummy_inputs, export_encoder
from exporters.shapes import fold_shapes
from tests.helpers.models import random_entries, tiny_model
from ziplm_deploy.models.resizing import resize

pytestmark = pytest.mark.transformers

SIZES = {"0.attention": 3, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 0}


def traced(model_type: str, path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> onnx.ModelProto:
    """A file as torch writes it, but for residuals."""
    monkeypatch.setattr(exporters.encoder, "fold_shapes", lambda model: 0)
    dense = tiny_model(model_type)
    model, settings = resize(dense, random_entries(dense, SIZES)), ExportSettings(seq_len=32, **changes)
    export_encoder(model, dummy_inputs(model, settings), ["last_hidden_state"], path, settings)
    return onnx.load(str(path))


@pytest.mark.parametrize("opset", [14, 17])
def test_the_same_answers_with_far_fewer_nodes(opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced("modernbert", tmp_path / "traced.onnx", monkeypatch, opset=opset)
    before = len(model.graph.node)
    removed = fold_shapes(model)
    assert len(model.graph.node) == before - removed < 0.6 * before
    onnx.checker.check_model(model, full_check=True)
    assert fold_shapes(copy.deepcopy(model)) == 0
    onnx.save(model, tmp_path / "folded.onnx")
    sessions = [onnxruntime.InferenceSession(tmp_path / name) for name in ("traced.onnx", "folded.onnx")]
    generator = np.random.default_rng(0)
    for shape in ((1, 5), (3, 30), (2, 1)):
        inputs = {"input_ids": generator.integers(5, 19, shape), "attention_mask": np.ones(shape, dtype=np.int64)}
        inputs["attention_mask"][-1, shape[1] // 2 + 1 :] = 0
        expected, found = (session.run(None, inputs)[0] for session in sessions)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_shape_of_a_layer_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced("modernbert", tmp_path / "model.onnx", monkeypatch)
    fold_shapes(model)
    # transformers 4 computes angles in each attention, for the batch at hand.
    in_layers = [node for node in model.graph.node if "/layers." in node.name and "/rotary_emb/" not in node.name]
    assert not [node.name for node in in_layers if node.op_type == "Shape"]
    constants = {tensor.name for tensor in model.graph.initializer}
    assert all(node.input[1] in constants for node in in_layers if node.op_type in ("Reshape", "Slice"))


def test_a_graph_without_rotary_positions_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced("bert", tmp_path / "model.onnx", monkeypatch)
    before = model.SerializeToString(deterministic=True)
    assert fold_shapes(model) == 0
    assert model.SerializeToString(deterministic=True) == before
