"""Files that an engine cannot run: a member is pruned a little further, another form is left out and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.models import save_dense
from tests.helpers.pipeline import recipe, write_rows
from ziplm_deploy.engines import Engine, ModelSignature, WorkerHandle
from ziplm_deploy.engines.trial import ModelRefusedError, Trial
from ziplm_deploy.errors import EngineError
from ziplm_deploy.pipeline import run_pipeline as run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model and data."""
    folder = tmp_path_factory.mktemp("refused")
    save_dense(folder / "model", task="text-classification", hidden_size=64, intermediate_size=512, num_hidden_layers=2)
    write_rows(folder / "train.jsonl", 64, 0)
    write_rows(folder / "test.jsonl", 30, 1)
    return folder


@pytest.mark.slow
def test_a_file_that_the_engine_cannot_run_is_left_out_and_named(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "may_abort", True)
    run_once = Trial.run

    def refusing(self: Trial, path: Path) -> None:
        if path.name == "model_int8.onnx" and path.parent.name == "1.5x":
            raise ModelRefusedError("assertion failed")
        run_once(self, path)

    monkeypatch.setattr(Trial, "run", refusing)
    settings = {"variants": ["int8"], "int8": {"n_calibration": 8}}
    report = run(recipe(made, compress=settings, output_dir=str(tmp_path)))
    assert [[file.variant for file in each.files] for each in report.members] == [["fp32", "int8"], ["fp32"]]
    assert any("cannot run these files" in note and "1.5x int8" in note for note in report.notes)
    with pytest.raises(EngineError, match="assertion failed"):
        run(recipe(made, compress={**settings, "target": "int8"}, output_dir=str(tmp_path / "target")))


@pytest.mark.slow
def test_a_pruned_model_that_the_engine_cannot_run_is_pruned_a_little_further(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "may_abort", True)
    load, bad = WorkerHandle.load, []

    def dying(self: WorkerHandle, model_id: str, path: Path) -> ModelSignature:
        if path.parent.name == "1.5x":
            bad.append(path.read_bytes())
            if path.read_bytes() == bad[0]:  # what the first plan became
                raise EngineError("the process died")
        return load(self, model_id, path)

    monkeypatch.setattr(WorkerHandle, "load", dying)
    report = run(recipe(made, output_dir=str(tmp_path)))
    assert {member.name for member in report.members} == {"dense", "1.5x"}
    served = (tmp_path / "tiny" / "1.5x" / "model.onnx").read_bytes()
    assert served != bad[0]
    correction = json.loads((tmp_path / "tiny" / "manifest.json").read_text())["corrections"]["1.5x"]
    assert correction["refused_plans"] >= 1
