"""What linears cost in each form: graphs of them, timed, and how a file's own linears read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.helpers.decoder_models import skip_in_old_engine
from ziplm_deploy.compression.int8.forms import FORMS
from ziplm_deploy.compression.int8.linear_times import (
    LinearTimes,
    PartTimes,
    _stack,
    _write_forms,
    part_of,
    time_linears,
)
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.recipe import Environment, Int8Config, Workload

SETTINGS = Int8Settings(Int8Config(), "onnxruntime", reduce_range=True)
GENERATES = Environment(workload=Workload(prefill=16, decode=4))


@pytest.mark.parametrize("only_last", [False, True])
def test_a_stack_is_the_sum_of_its_linears(tmp_path: Path, only_last: bool) -> None:
    path = tmp_path / "stack.onnx"
    model = _stack(8, 12, 3, only_last=only_last)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    x = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    expected = sum((x + copy / 3) @ weights[f"weight.{copy}"] for copy in range(3))
    np.testing.assert_allclose(found, expected[:, -1:] if only_last else expected, atol=1e-4)


def test_forms_of_a_stack_hold_what_they_say(tmp_path: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    paths = _write_forms(tmp_path, (64, 96), 2, SETTINGS, only_last=False)
    kinds = {
        form: [node.op_type for node in onnx.load(str(path)).graph.node if "MatMul" in node.op_type]
        for form, path in paths.items()
    }
    assert kinds == {
        "float32": ["MatMul"] * 2,
        "int8": ["MatMulInteger"] * 2,
        "weight-only-8": ["MatMulNBits"] * 2,
        "weight-only-4": ["MatMulNBits"] * 2,
    }
    x = np.random.default_rng(1).standard_normal((1, 5, 64)).astype(np.float32)
    answers = {form: onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0] for form, path in paths.items()}
    errors = {form: float(np.abs(answer - answers["float32"]).mean()) for form, answer in answers.items()}
    assert 0 < errors["weight-only-8"] < errors["weight-only-4"] < 1
    assert 0 < errors["int8"] < 0.1


def test_parts_of_layers_and_the_head_are_timed_on_every_call(tmp_path: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    shapes = {
        "layers.0.attention.qkv": (32, 48),
        "layers.1.attention.qkv": (32, 96),
        "layers.0.feed_forward.gate": (32, 96),
        "layers.0.feed_forward.down": (64, 32),
        "head": (32, 96),
    }
    told: list[tuple[int, int]] = []
    times = time_linears(shapes, GENERATES, SETTINGS, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {part: (found.n_inputs, found.n_outputs) for part, found in times.parts.items()} == {
        "attention.qkv": (32, 96),
        "feed_forward.gate": (32, 96),
        "feed_forward.down": (64, 32),
        "head": (32, 96),
    }
    assert times.parts["feed_forward.gate"] == times.parts["attention.qkv"]  # of one shape: timed once
    assert times.parts["head"].ms != times.parts["attention.qkv"].ms  # of the last token only
    total = sum(n_inputs * n_outputs for n_inputs, n_outputs in shapes.values())
    for part in times.parts.values():
        assert part.copies == max(1, total // (part.n_inputs * part.n_outputs))
        assert set(part.ms) == set(FORMS)
    times.save(tmp_path / "times.json")
    assert LinearTimes.load(tmp_path / "times.json") == times


def test_a_linear_takes_its_share_of_its_part() -> None:
    ms = {form: 1.0 + place for place, form in enumerate(FORMS)}
    parts = {
        "attention.qkv": PartTimes(n_inputs=10, n_outputs=30, copies=1, ms=ms),
        "feed_forward.up": PartTimes(n_inputs=10, n_outputs=70, copies=1, ms={form: 3 * ms[form] for form in FORMS}),
        "head": PartTimes(n_inputs=10, n_outputs=1000, copies=1, ms={form: 100.0 for form in FORMS}),
    }
    times = LinearTimes(environment=GENERATES, engine_version="1", parts=parts)
    assert times.ms("layers.3.attention.qkv", 150, "int8") == pytest.approx(0.5 * ms["int8"])
    assert times.ms("head", 5000, "float32") == pytest.approx(50.0)
    # No such part in the dense file: the mean of its layers, the head left out.
    assert times.ms("layers.3.attention.query", 100, "float32") == pytest.approx(100 * (1 + 3) / 1000)
    assert [part_of(name) for name in ("head", "layers.3.attention.qkv")] == ["head", "attention.qkv"]
