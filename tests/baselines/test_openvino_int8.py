"""Stock static INT8 of OpenVINO is made by NNCF, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.dense_files import calibration, dense_source
from ziplm_deploy.baselines import base, get_baseline, openvino_int8
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError

needs_nncf = pytest.mark.skipif(
    not (find_spec("nncf") and find_spec("openvino")), reason="NNCF or OpenVINO are not installed"
)


def test_what_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise base.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(base.importlib.metadata, "version", missing)
    with pytest.raises(EngineError, match=r'expected nncf, found it not installed; run: pip install "ziplm-deploy'):
        get_baseline("openvino-int8").tool()


@needs_nncf
@pytest.mark.slow
def test_its_answers_are_near_those_of_the_dense_model(tmp_path: Path) -> None:
    source, baseline = dense_source(tmp_path), get_baseline("openvino-int8")
    (tmp_path / "made").mkdir()
    baseline.make(source, tmp_path / "made")
    assert "nncf" not in sys.modules
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(baseline.files)
    assert (tmp_path / "made" / "model.xml").read_text(encoding="utf-8").count('type="FakeQuantize"') >= 3 * 4
    with get_engine("openvino").start_worker(WorkerOptions()) as worker:
        worker.load("dense", source.onnx)
        worker.load("int8", tmp_path / "made" / "model.xml")
        for inputs in calibration(source.model()):
            expected, found = (worker.infer(name, inputs)["sentence_embedding"] for name in ("dense", "int8"))
            assert 0.9 < float(np.sum(expected * found)) < 1 - 1e-7


@needs_nncf
@pytest.mark.slow
def test_paths_relative_to_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dense_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    relative = dataclasses.replace(source, onnx=source.onnx.relative_to(tmp_path))
    get_baseline("openvino-int8").make(relative, Path("made"))
    assert (tmp_path / "made" / "model.bin").stat().st_size > 0


def test_the_process_in_another_folder_gets_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = dense_source(tmp_path), []
    monkeypatch.setattr(openvino_int8, "_run", lambda file: asked.append(json.loads(file.read_text(encoding="utf-8"))))
    monkeypatch.chdir(tmp_path)
    relative = dataclasses.replace(source, onnx=source.onnx.relative_to(tmp_path))
    get_baseline("openvino-int8").make(relative, Path("made"))
    assert Path(asked[0]["source"]) == source.onnx.resolve()
    assert Path(asked[0]["target"]) == (tmp_path / "made" / "model.xml").resolve()


@needs_nncf
def test_a_model_that_it_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    source = dense_source(tmp_path)
    source.onnx.write_bytes(b"no graph")
    (tmp_path / "made").mkdir()
    with pytest.raises(
        EngineError, match=r"expected NNCF to quantize .*found: .*Unable to read the model.*leave openvino-int8 out"
    ):
        get_baseline("openvino-int8").make(source, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


@needs_nncf
@pytest.mark.slow
def test_inputs_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    source = dense_source(tmp_path, "roberta", "text-classification")  # takes no token_type_ids
    more = dataclasses.replace(source, batches=lambda: calibration(source.model()))
    (tmp_path / "made").mkdir()
    get_baseline("openvino-int8").make(more, tmp_path / "made")
    assert (tmp_path / "made" / "model.bin").stat().st_size > 0
