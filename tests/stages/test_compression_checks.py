"""What compression needs is found out at once; calibration batches fit the files; stand-ins are told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.int8_files import constants, exported, tensors
from tests.helpers.models import save_dense, sentences, tiny_model
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.side_environments import NEURAL_COMPRESSOR
from ziplm_deploy.models.member_files import replace_member
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.recipe import Recipe, Variant, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_compression
from ziplm_deploy.stages.export import export_stand_in

TOOL = {"variants": ["int8"], "int8": {"backend": "neural-compressor"}}
SPARSE = {"variants": ["sparse"], "target": "sparse"}


def recipe(**sections: Any) -> Recipe:
    raw: dict[str, Any] = {"name": "x", "model": {"path": "m", "task": "sentence-similarity"}, "speedups": [2]}
    return parse_recipe({**raw, "data": {"calibration": "texts.csv"}, **sections})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of two tasks, and thirty different texts."""
    folder = tmp_path_factory.mktemp("dense")
    for task in ("sentence-similarity", "text-classification"):
        save_dense(folder / task, task=task, num_hidden_layers=1)
    texts = list(dict.fromkeys(sentences(60)))[:30]
    rows = [{"text": text, "label": index % 3} for index, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run_of(checkpoint: Path, output_dir: Path, task: str = "sentence-similarity", **sections: Any) -> Run:
    model = {"path": str(checkpoint / task), "task": task, **sections.pop("model", {})}
    data = {"calibration": str(checkpoint / "texts.jsonl"), "n_calibration": 30}
    return Run(recipe(model=model, data=data, output_dir=str(output_dir), **sections))


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> Path:
    """An interpreter whose neural-compressor is of a version."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv(NEURAL_COMPRESSOR.variable, str(python))
    return python


@pytest.mark.parametrize("answer", ["2.5", "2.6.1", "3.1", "", "-c import importlib"])
def test_another_version_of_neural_compressor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    python = pretend(tmp_path, monkeypatch, answer)
    with pytest.raises(EngineError, match=f"neural-compressor 2.6 in {python}, found '{answer}'") as caught:
        check_compression(recipe(compress=TOOL))
    assert "run: ziplm-deploy setup neural-compressor" in str(caught.value)
    assert f"unset {NEURAL_COMPRESSOR.variable}" in str(caught.value)


def test_a_python_without_neural_compressor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NEURAL_COMPRESSOR.variable, sys.executable)
    with pytest.raises(EngineError, match="run: ziplm-deploy setup neural-compressor"):
        check_compression(recipe(compress=TOOL))


def test_the_version_of_a_set_up_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "2.6")
    check_compression(recipe(compress=TOOL))


def test_who_does_not_use_neural_compressor_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "2.5")
    check_compression(recipe(compress={"variants": ["int8"]}))
    check_compression(recipe(compress={"variants": ["sparse"], "int8": {"backend": "neural-compressor"}}))


@pytest.mark.parametrize("task", ["sentence-similarity", "text-classification"])
@pytest.mark.parametrize(("n_rows", "batch_size", "n_batches"), [(10, 32, 1), (8, 8, 1), (20, 8, 2), (3, 7, 1)])
def test_static_files_get_whole_batches(
    tmp_path: Path, checkpoint: Path, task: str, n_rows: int, batch_size: int, n_batches: int
) -> None:
    run = run_of(
        checkpoint,
        tmp_path,
        task,
        environment={"workload": {"batch_size": batch_size, "seq_len": 16}},
        export={"shapes": "static"},
        compress={"variants": ["int8"], "int8": {"n_calibration": n_rows}},
    )
    assert len(run.data.ranges_batches) == n_batches
    assert {value.shape for batch in run.data.ranges_batches for value in batch.values()} == {(batch_size, 16)}
    found = [tuple(row.tolist()) for batch in run.data.ranges_batches for row in batch["input_ids"]]
    there = {
        tuple(row.tolist()) for batch in run.data.encode(run.data.ranges_rows, 1, 16) for row in batch["input_ids"]
    }
    assert set(found) <= there
    if n_rows < batch_size:  # every example is there, equally often
        assert {found.count(row) for row in there} <= {batch_size // n_rows, -(-batch_size // n_rows)}


def test_rows_of_one_text_fill_a_batch_too(tmp_path: Path, checkpoint: Path) -> None:
    run = run_of(
        checkpoint, tmp_path, environment={"workload": {"batch_size": 4, "seq_len": 16}}, export={"shapes": "static"}
    )
    text = run.data.calibration_rows[0]
    run.data.calibration_rows = [text] * 6 + run.data.calibration_rows[1:3]
    [batch] = run.data.ranges_batches  # three different texts of eight rows
    assert batch["input_ids"].shape == (4, 16)
    assert len(torch.unique(batch["input_ids"], dim=0)) == 3


def test_every_digit_of_the_sparsity_is_in_the_form() -> None:
    forms = [
        target_treatment(recipe(compress={**SPARSE, "sparsity": {"sparsity": sparsity}}))
        for sparsity in (0.8, 0.804, 0.8000001)
    ]
    assert len({form.description for form in forms if form is not None}) == 3
    assert forms[0] is not None
    assert forms[0].description == "0.8 of the weights are zero, unstructured"


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("embeddings", [True, False])
def test_a_table_without_layers_rounds_embeddings_like_its_members(
    tmp_path: Path, layers: int, embeddings: bool
) -> None:
    settings = {"variants": ["int8"], "target": "int8", "int8": {"embeddings": embeddings}}
    form = target_treatment(recipe(compress=settings))
    assert form is not None
    assert ("8-bit embeddings" in form.description) is embeddings
    model = tiny_model("bert", num_hidden_layers=1, vocab_size=24_000)
    del layers_of(model)[layers:]
    source = exported(tmp_path, model=model)
    form.finish(source.path, tensors(source.batches[0]))
    kinds = {value.dtype for value in constants(onnx.load(str(source.path)).graph).values() if len(value) == 24_000}
    assert kinds == {np.dtype("int8" if embeddings else "float32")}


def test_a_stand_in_is_made_again_for_another_pooling(tmp_path: Path, checkpoint: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"pooling": "cls"}, {"pooling": "cls", "normalize": False}]
    files = []
    for model in settings:
        asked = {"model": model, "environment": {"workload": {"seq_len": 16}}, "compress": SPARSE}
        with run_of(checkpoint, tmp_path, **asked) as run:
            [member] = run.pruned_members
            if not files:
                replace_member(member.pruned_folder, run.dense.model, run.dense.processor, run.recipe.model, {})
            export_stand_in(run, member)
            made = member.stand_in(Variant.SPARSE)
            files.append(made.read_bytes())
            written = made.stat().st_mtime_ns
            export_stand_in(run, member)  # nothing has changed
            assert made.stat().st_mtime_ns == written
    assert len(set(files)) == 3
