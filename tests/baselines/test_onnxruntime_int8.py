"""Stock dynamic INT8 is what optimum writes, with the settings of the one-line exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.helpers.dense_files import calibration, dense_source
from ziplm_deploy.baselines import get_baseline, onnxruntime_int8
from ziplm_deploy.baselines.onnxruntime_int8 import (
    PRESETS,
    preset_of,
    quantize_as_optimum,
    quantize_with_optimum,
)
from ziplm_deploy.compression.int8.scales import quiet
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import machine_info

MODELS = (("bert", "sentence-similarity"), ("roberta", "text-classification"), ("vit", "image-classification"))


@pytest.mark.transformers
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("model_type", "task"), MODELS)
def test_optimum_writes_the_same_bytes(tmp_path: Path, model_type: str, task: str, preset: str) -> None:
    pytest.importorskip("optimum.onnxruntime")
    source = dense_source(tmp_path, model_type, task).onnx
    with quiet():
        quantize_with_optimum(source, tmp_path / "optimum.onnx", preset)
        quantize_as_optimum(source, tmp_path / "same.onnx", preset)
    assert (tmp_path / "same.onnx").read_bytes() == (tmp_path / "optimum.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("preset", "kind"), [("avx512_vnni", TensorProto.INT8), ("avx2", TensorProto.UINT8)])
def test_every_linear_has_a_scale_for_each_output(tmp_path: Path, preset: str, kind: int) -> None:
    source = dense_source(tmp_path)
    with quiet():
        quantize_as_optimum(source.onnx, tmp_path / "int8.onnx", preset)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    tensors = {item.name: item for item in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    weights = [tensors[node.input[1]] for node in products if node.input[1] in tensors]
    assert len(weights) == 3 * 6
    assert {weight.data_type for weight in weights} == {kind}
    scales = [tensors[f"{weight.name.removesuffix('_quantized')}_scale"] for weight in weights]
    assert [list(scale.dims) for scale in scales] == [[weight.dims[1]] for weight in weights]
    assert len(products) == 3 * 8  # products of activations, too, as optimum leaves them to the quantizer


def test_its_answers_are_near_those_of_the_dense_model(tmp_path: Path) -> None:
    source = dense_source(tmp_path)
    baseline = get_baseline("onnxruntime-int8")
    (tmp_path / "made").mkdir()
    baseline.make(source, tmp_path / "made")
    assert [path.name for path in (tmp_path / "made").iterdir()] == list(baseline.files)
    dense, int8 = onnx_runner(source.onnx), onnx_runner(tmp_path / "made" / "model.onnx")
    for inputs in calibration(source.model()):
        expected, found = dense(inputs)["sentence_embedding"], int8(inputs)["sentence_embedding"]
        assert 0.95 < float(np.sum(expected * found)) < 1 - 1e-7


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        (("avx", "avx2", "avx512f", "avx512_vnni"), "avx512_vnni"),
        (("avx2", "avx512f"), "avx512"),
        (("avx2", "avx_vnni"), "avx2"),
        (("asimd", "asimddp"), "arm64"),
    ],
)
def test_settings_follow_the_cpu(flags: tuple[str, ...], preset: str) -> None:
    machine = machine_info().model_copy(update={"isa_flags": flags})
    assert preset_of(machine) == preset
    assert preset in get_baseline("onnxruntime-int8").settings(machine)


def test_a_cpu_without_settings_is_refused() -> None:
    machine = machine_info().model_copy(update={"isa_flags": ("sse4_2",), "cpu_model": "Z80"})
    with pytest.raises(EngineError, match=r"AVX2 or ARM's NEON.*found Z80; leave onnxruntime-int8 out"):
        preset_of(machine)


def test_the_record_says_who_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = get_baseline("onnxruntime-int8")
    monkeypatch.setattr(onnxruntime_int8, "optimum_version", lambda: None)
    assert "arguments of optimum-onnx 0.1.0" in baseline.tool()
    monkeypatch.setattr(onnxruntime_int8, "optimum_version", lambda: "0.1.3")
    assert baseline.tool().startswith("optimum-onnx 0.1.3 with onnxruntime ")


def test_a_file_that_it_cannot_quantize_is_refused(tmp_path: Path) -> None:
    source = dense_source(tmp_path)
    source.onnx.write_bytes(b"no graph")
    (tmp_path / "made").mkdir()
    with pytest.raises(EngineError, match=r"found: .*; leave onnxruntime-int8 out of benchmark\.baselines"):
        get_baseline("onnxruntime-int8").make(source, tmp_path / "made")
