"""Training inside the whole way, on a tiny model with the real engine: modes, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ziplm_deploy
from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, recipe, stamps, write_rows, written_again
from ziplm_deploy.errors import DataError, NumericalError, RecipeError, UsageError
from ziplm_deploy.pipeline import run_pipeline as run
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.manifest import Manifest
from ziplm_deploy.run.member import PrunedMember
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages import settle

TRAINING = {"max_steps": 6, "batch_size": 16, "save_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and a latency table."""
    folder = tmp_path_factory.mktemp("recovery")
    save_dense(
        folder / "model", task="text-classification", hidden_size=128, intermediate_size=512, num_hidden_layers=3
    )
    write_rows(folder / "train.jsonl", 80, 0)
    write_rows(folder / "test.jsonl", 30, 1)
    ziplm_deploy.profile(recipe(folder))
    shutil.move(folder / "runs" / "tiny" / "profile.json", folder / "table.json")
    return folder


def with_training(folder: Path, mode: str, **changes: Any) -> dict[str, Any]:
    raw = raw_recipe(folder, speedups=[1.5, 2.5], profile={"table": str(folder / "table.json")})
    recover = {"mode": mode, **TRAINING, **changes.pop("recover", {})}
    return {**raw, "recover": recover, **changes}


@pytest.fixture(scope="module", params=["one-shot", pytest.param("gradual", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    run(parse_recipe(with_training(folder, request.param)))
    return request.param, folder


def test_a_family_is_trained_and_reported_beside_what_it_was_before(trained: tuple[str, Path]) -> None:
    mode, folder = trained
    run_dir = folder / "runs" / "tiny"
    report = FamilyReport.load(run_dir / "report.json")
    assert report.recovery == mode
    for member in report.members[1:]:
        assert member.training is not None
        assert (member.training.steps, member.training.examples_per_step) == (6, 16)
        assert set(member.accuracy_before_training) == set(member.served.accuracy)
        assert (run_dir / member.name / "model.onnx").read_bytes() != (
            run_dir / "pruning" / member.name / "model.onnx"
        ).read_bytes()
    assert "## Training" in (run_dir / "report.md").read_text(encoding="utf-8")
    assert "before training" in (run_dir / "report.md").read_text(encoding="utf-8")
    assert not (run_dir / "recovery").exists()


def test_a_gradual_member_keeps_a_part_of_the_one_before(trained: tuple[str, Path]) -> None:
    mode, folder = trained
    small, large = (
        json.loads((folder / "runs" / "tiny" / name / "ziplm_config.json").read_text(encoding="utf-8"))["kept"]
        for name in ("2.5x", "1.5x")
    )
    nested = all(set(small[name]) <= set(large[name]) for name in small)
    if mode == "gradual":
        assert nested
        assert (folder / "runs" / "tiny" / "pruning" / "database-of-1.5x.safetensors").exists()
    else:
        assert not (folder / "runs" / "tiny" / "pruning" / "database-of-1.5x.safetensors").exists()


def test_trained_members_load_in_torch(trained: tuple[str, Path]) -> None:
    _, folder = trained
    sizes = PruningPlan.load(folder / "runs" / "tiny" / "pruning" / "2.5x.json").sizes
    model = ziplm_deploy.load(folder / "runs" / "tiny" / "2.5x")
    assert {name: len(kept) for name, kept in model.ziplm_kept.items()} == sizes  # type: ignore[union-attr, operator]


def test_a_second_run_trains_nothing_and_another_training_measures_nothing_twice(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    mode, made = trained
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    raw = with_training(folder, mode)
    raw["profile"]["table"] = str(folder / "table.json")
    again = written_again(folder, parse_recipe(raw))
    assert not {name for name in again if name.endswith((".safetensors", ".onnx", "benchmark.json"))}
    raw["recover"]["lora"] = {"rank": 4}
    before = stamps(folder)
    ziplm_deploy.recover(parse_recipe(raw))
    changed = {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}
    assert {"1.5x/pruned.safetensors", "1.5x/model.onnx"} <= changed
    assert not {"profile.json", "pruning/database.safetensors", "pruning/1.5x/model.onnx"} & changed
    assert TrainingRecord.load(folder / "runs" / "tiny" / "1.5x" / "training.json").lora_rank == 4


def test_without_training_a_trained_member_is_not_taken_for_a_pruned_one(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    mode, made = trained
    if mode == "gradual":
        pytest.skip("there the second member is pruned from a trained one")
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    raw = with_training(folder, "none")
    raw["profile"]["table"] = str(folder / "table.json")
    report = run(parse_recipe(raw))
    run_dir = folder / "runs" / "tiny"
    assert all(member.training is None for member in report.members)
    assert not (run_dir / "1.5x" / "training.json").exists()
    for name in ("1.5x", "2.5x"):
        one, other = (load_file(path / name / "pruned.safetensors") for path in (run_dir, run_dir / "pruning"))
        assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.slow
def test_a_training_that_fails_leaves_the_pruned_model_and_goes_on_where_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ziplm_deploy.recovery.training import DistillationTrainer

    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    raw = with_training(folder, "one-shot", speedups=[1.5])
    genuine = DistillationTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = genuine(self, *args, **kwargs)
        if self.state.global_step >= 4:
            raise NumericalError(f"expected a finite loss, found nan in step {self.state.global_step + 1}")
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "compute_loss", poisoned)
        with pytest.raises(NumericalError, match="step 5"):
            ziplm_deploy.recover(parse_recipe(raw))
    run_dir = folder / "runs" / "tiny"
    assert not (run_dir / "1.5x").exists()
    assert list(run_dir.glob("recovery/*/checkpoint-4"))
    stamp = (run_dir / "pruning" / "1.5x" / "model.onnx").stat().st_mtime_ns
    ziplm_deploy.recover(parse_recipe(raw))
    assert TrainingRecord.load(run_dir / "1.5x" / "training.json").steps == 6
    assert (run_dir / "pruning" / "1.5x" / "model.onnx").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_base_checkpoint_is_fine_tuned_first(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "model")
    save_dense(
        folder / "model", task="sentence-similarity", hidden_size=128, intermediate_size=512, num_hidden_layers=3
    )
    raw = raw_recipe(folder, dense={"train": True, **TRAINING})
    report = run(parse_recipe(raw))
    assert 0 <= report.members[0].served.accuracy["accuracy"] <= 1
    config = json.loads((folder / "runs" / "tiny" / "dense-checkpoint" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}
    again = written_again(folder, parse_recipe(raw))
    assert not {name for name in again if name.endswith((".safetensors", ".onnx"))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recover": {"batch_size": 500}}, DataError, "at least one batch of 500"),
        ({"recover": {"token_weight": 0, "logit_weight": 0}}, RecipeError, "above 0"),
        ({"recover": {"teacher": "small"}}, UsageError, "hidden_size 128"),
        ({"recover": {"precision": "fp16"}}, RecipeError, "recover.precision fp32 or bf16"),
        ({"recover": {"task_weight": 1}, "unlabelled": True}, DataError, "recover.task_weight: 0"),
        ({"dense": {"train": True}, "unlabelled": True}, DataError, "label"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_dense(folder / "small", task="text-classification")
    if changes.pop("unlabelled", False):
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        text = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
        (folder / "train.jsonl").write_text(text, encoding="utf-8")
    if "teacher" in changes.get("recover", {}):
        changes["recover"]["teacher"] = str(folder / "small")
    with pytest.raises(error, match=message):
        run(parse_recipe(with_training(folder, "gradual", **changes)))
    assert not (folder / "runs" / "tiny" / "pruning").exists()


def test_labels_that_nothing_reads_need_not_fit_the_head(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps({"text": row["text"], "label": -1}) + "\n" for row in rows)
    (folder / "other.jsonl").write_text(text, encoding="utf-8")
    raw = with_training(folder, "one-shot", speedups=[1.5])
    raw["data"]["train"] = str(folder / "other.jsonl")
    assert ziplm_deploy.recover(parse_recipe(raw))["1.5x"].steps == 6
    raw["recover"]["task_weight"] = 1.0
    with pytest.raises(DataError, match="found -1"):
        run(parse_recipe(raw))


def test_an_embedding_model_has_no_task_loss(tmp_path: Path) -> None:
    save_dense(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 80, 0)
    raw = raw_recipe(tmp_path, model={"task": "sentence-similarity"}, recover={"mode": "one-shot", "task_weight": 1})
    raw["data"].pop("evaluation")
    with pytest.raises(RecipeError, match="distillation needs no labels"):
        run(parse_recipe(raw))


def test_pruning_alone_is_refused_where_it_needs_trained_models(base: Path) -> None:
    with pytest.raises(UsageError, match="ziplm-deploy recover"):
        ziplm_deploy.prune(parse_recipe(with_training(base, "gradual")))
    with pytest.raises(RecipeError, match="one-shot or gradual"):
        ziplm_deploy.recover(recipe(base))


@pytest.mark.slow
def test_drafts_of_all_generations_are_timed_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    raw = with_training(tmp_path, "gradual")
    raw["benchmark"] |= {"max_corrections": 1, "tolerance": 0.49, "overshoot": 100.0}  # only drafts move an aim
    time_drafts, timed = settle._time_drafts, []

    def off_by_two_percent(run: Run, members: Sequence[PrunedMember]) -> dict[str, dict[str, float]]:
        time_drafts(run, members)  # of models this small it measures noise
        timed.extend(member.name for member in members)
        return {member.name: {"promised": 1.02 * member.target, "measured": member.target} for member in members}

    monkeypatch.setattr(settle, "_time_drafts", off_by_two_percent)
    ziplm_deploy.recover(parse_recipe(raw))
    assert timed == ["1.5x", "2.5x"]
    run_dir = tmp_path / "runs" / "tiny"
    corrections = Manifest.load(run_dir / "manifest.json").corrections
    assert {name: each.predicted_target for name, each in corrections.items()} == pytest.approx(
        {"1.5x": 1.005 * 1.02 * 1.5, "2.5x": 1.005 * 1.02 * 2.5}
    )
    made = {"pruning/settling.json", "pruning/1.5x.json", "2.5x/model.onnx"}
    assert all((run_dir / name).is_file() for name in made)
    before = stamps(tmp_path)
    ziplm_deploy.recover(parse_recipe(raw))
    assert {name: stamps(tmp_path)[name] for name in made} == {name: before[name] for name in made}
