"""The dense model in torch: a checkpoint that a worker loads by itself, and that answers as the model does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.dense_files import dense_source
from tests.helpers.models import output_tensors, tiny_inputs
from ziplm_deploy.baselines import get_baseline
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError

OPTIONS = WorkerOptions(batch_size=2, seq_len=16)
MODELS = (
    ("bert", "sentence-similarity"),
    ("distilbert", "text-classification"),
    ("mpnet", "fill-mask"),
    ("vit", "image-classification"),
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Folder of a checkpoint."""
    get_baseline("torch").make(dense_source(tmp_path), tmp_path)
    return tmp_path


@pytest.mark.transformers
@pytest.mark.parametrize(("model_type", "task"), MODELS)
def test_it_answers_as_the_model_and_takes_time(tmp_path: Path, model_type: str, task: str) -> None:
    source, baseline = dense_source(tmp_path, model_type, task), get_baseline("torch")
    (tmp_path / "made").mkdir()
    baseline.make(source, tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} >= set(baseline.files)
    inputs = tiny_inputs(source.model())
    expected = output_tensors(source.model(), inputs)
    with get_engine("torch").start_worker(OPTIONS) as worker:
        signature = worker.load("a", tmp_path / "made" / baseline.files[0])
        assert {tensor.name for tensor in signature.inputs} == set(inputs)
        found = worker.infer("a", {name: value.numpy() for name, value in inputs.items()})
        assert len(worker.time("a", n=3)) == 3
        assert worker.version == get_engine("torch").version()
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-4)


def refusal(path: Path) -> str:
    with get_engine("torch").start_worker(OPTIONS) as worker, pytest.raises(EngineError) as caught:
        worker.load("a", path)
    return str(caught.value)


def test_onnx_files_are_refused(made: Path) -> None:
    assert "torch runs no ONNX files" in refusal(made / "model.onnx")


def test_missing_weights_are_refused(made: Path) -> None:
    weights = load_file(made / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    assert "found none for encoder.layer.0.output.dense.weight" in refusal(made / "model.safetensors")


def test_code_of_the_folder_is_not_run(made: Path) -> None:
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (made / "mine.py").write_text(f"open({str(made / 'ran')!r}, 'w')\nraise SystemExit", encoding="utf-8")
    with get_engine("torch").start_worker(OPTIONS) as worker:
        worker.load("a", made / "model.safetensors")
    assert not (made / "ran").exists()


def test_the_checkpoint_is_the_model_as_it_is(made: Path) -> None:
    expected = dense_source(made).model().state_dict()
    found = load_file(made / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items() if name in found)
    assert len(found) > 40
