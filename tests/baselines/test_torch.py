"""The dense model in torch: a checkpoint that a worker loads by itself, and that answers as the model does."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.decoder_models import causal_model
from tests.helpers.dense_files import dense_source
from tests.helpers.models import output_tensors, tiny_inputs
from ziplm_deploy.baselines import DenseSource, get_baseline
from ziplm_deploy.engines import WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.engines.worker import torch_checkpoint
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.models.causal import as_linears

OPTIONS = WorkerOptions(batch_size=2, seq_len=16)
MODELS = (
    ("bert", "sentence-similarity"),
    ("distilbert", "text-classification"),
    ("mpnet", "fill-mask"),
    ("vit", "image-classification"),
)


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerHandle]:
    """One process for all: its import of torch and transformers takes seconds."""
    with get_engine("torch").start_worker(OPTIONS) as worker:
        yield worker


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Folder of a checkpoint."""
    get_baseline("torch").make(dense_source(tmp_path), tmp_path)
    return tmp_path


@pytest.mark.transformers
@pytest.mark.parametrize(("model_type", "task"), MODELS)
def test_it_answers_as_the_model_and_takes_time(
    worker: WorkerHandle, tmp_path: Path, model_type: str, task: str
) -> None:
    source, baseline = dense_source(tmp_path, model_type, task), get_baseline("torch")
    (tmp_path / "made").mkdir()
    baseline.make(source, tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} >= set(baseline.files)
    inputs = tiny_inputs(source.model())
    expected = output_tensors(source.model(), inputs)
    signature = worker.load(model_type, tmp_path / "made" / baseline.files[0])
    assert {tensor.name for tensor in signature.inputs} == set(inputs)
    found = worker.infer(model_type, {name: value.numpy() for name, value in inputs.items()})
    assert len(worker.time(model_type, n=3)) == 3
    assert worker.version == get_engine("torch").version()
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-4)


def test_onnx_files_are_refused(worker: WorkerHandle, made: Path) -> None:
    with pytest.raises(EngineError, match="torch runs no ONNX files"):
        worker.load("ONNX", made / "model.onnx")


def test_missing_weights_are_refused(worker: WorkerHandle, made: Path) -> None:
    weights = load_file(made / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"found none for encoder\.layer\.0\.output\.dense\.weight"):
        worker.load("half", made / "model.safetensors")


def test_code_of_the_folder_is_not_run(worker: WorkerHandle, made: Path) -> None:
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (made / "mine.py").write_text(f"open({str(made / 'ran')!r}, 'w')\nraise SystemExit", encoding="utf-8")
    worker.load("with code", made / "model.safetensors")
    assert not (made / "ran").exists()


def test_the_checkpoint_is_the_model_as_it_is(made: Path) -> None:
    expected = dense_source(made).model().state_dict()
    found = load_file(made / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items() if name in found)
    assert len(found) > 40


@pytest.mark.transformers
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_language_models_are_called_with_a_cache(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda count: None)
    model = as_linears(causal_model(kind))
    source = DenseSource(tmp_path, lambda: model, list, machine_info(), lambda path: None)
    get_baseline("torch").make(source, tmp_path)
    session = torch_checkpoint.Sessions(argparse.Namespace(threads=1)).load(str(tmp_path / "model.safetensors"))
    seen: list[tuple[tuple[int, ...], int]] = []
    forward = session.model.forward

    @functools.wraps(forward)
    def watched(**inputs: Any) -> Any:
        past = inputs.get("cache", inputs.get("past_key_values"))
        seen.append((tuple(inputs["input_ids"].shape), 0 if past is None else past.get_seq_length()))
        return forward(**inputs)

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 4), np.int64)})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    monkeypatch.setattr(session.model, "forward", watched)
    prefill, decode = session.timed_calls([(2, 7, 0), (2, 1, 9)])
    assert all(ms > 0 for ms in (prefill(), prefill(), decode(), decode()))
    assert seen == [((2, 7), 0)] * 2 + [((2, 9), 0)] + [((2, 1), 9)] * 2
