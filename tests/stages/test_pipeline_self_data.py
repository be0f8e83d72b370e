"""Whole runs without any text: the dense model writes it, and members are trained on it by adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import ziplm_deploy
from tests.helpers.pipeline import causal_recipe, save_causal, written_again
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.recovery.self_data import SampledTexts, TextSampler, read_texts
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.calibrate import database_key
from ziplm_deploy.stages.profile import profile_key
from ziplm_deploy.stages.recover import recovery_key

pytestmark = pytest.mark.transformers

ADAPTERS = {"max_steps": 6, "batch_size": 4, "save_steps": 2, "learning_rate": 1e-3, "lora": {"rank": 4}}
SAMPLED = {"n_windows": 64, "batch_size": 24}


def without_text(folder: Path, mode: str = "gradual", **changes: Any) -> dict[str, Any]:
    """Recipe of a run that is given no text but for its evaluation."""
    raw = causal_recipe(folder, speedups=[1.2, 1.5], recover={"mode": mode, **ADAPTERS}, **changes)
    del raw["data"]["calibration"]
    raw["data"] |= {"generated": SAMPLED, "n_calibration": 48}
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("self-data")
    save_causal(folder, tie_word_embeddings=True)
    run_pipeline(parse_recipe(without_text(folder)))
    return folder


@pytest.fixture
def run_dir(finished: Path) -> Path:
    return finished / "runs" / "tiny"


def names_in(path: Path) -> set[str]:
    with safe_open(path, framework="numpy") as tensors:
        return set(tensors.keys())


@pytest.mark.slow
def test_reports_and_cards_say_what_the_text_is(run_dir: Path) -> None:
    report, texts = FamilyReport.load(run_dir / "report.json"), read_texts(run_dir / "sampled-texts")
    assert report.sampled_text is not None
    assert report.sampled_text.serves == ["calibration", "training"]
    assert (report.sampled_text.n_texts, report.sampled_text.n_tokens) == (len(texts.ids), texts.n_tokens)
    assert texts.n_tokens >= 64 * 16
    for file in ("report.md", "1.5x/README.md"):
        text = (run_dir / file).read_text(encoding="utf-8")
        assert "No text was given for calibration and training: it was sampled from the dense model." in text
        assert "The text is plain, with no chat template around it." in text
        assert "Trained were adapters of rank 4 (LoRA)" in text
    assert "sample texts" in report.stage_seconds
    assert not list(run_dir.glob("sampling-*"))


@pytest.mark.slow
def test_members_are_trained_by_adapters_and_none_is_left(run_dir: Path) -> None:
    for member in ("1.2x", "1.5x"):
        record = TrainingRecord.load(run_dir / member / "training.json")
        assert (record.steps, record.lora_rank) == (6, 4)
        assert record.trained_parameters
        assert names_in(run_dir / member / "pruned.safetensors") == names_in(
            run_dir / "pruning" / member / "pruned.safetensors"
        )
        ziplm_deploy.load(run_dir / member)
    assert not (run_dir / "recovery").exists()


@pytest.mark.slow
def test_a_finished_run_samples_nothing_and_other_settings_sample_and_calibrate_again(finished: Path) -> None:
    changed = written_again(finished, parse_recipe(without_text(finished)))
    assert not {name for name in changed if name.endswith((".onnx", ".safetensors")) or name.startswith("sampled")}
    cold = without_text(finished)
    cold["data"]["generated"] = {**SAMPLED, "temperature": 0.5}
    other_rank = without_text(finished)
    other_rank["recover"]["lora"] = {"rank": 2}
    for raw, expected in (
        (without_text(finished), (True, True, True)),
        (other_rank, (True, True, False)),
        (cold, (False, False, False)),
    ):
        with Run(parse_recipe(raw)) as run:
            member, parent = run.pruned_members[0], run.parent(run.dense_member)
            calibrated = run.folder.is_made("calibrate", database_key(run, run.dense_member, parent))
            trained = run.folder.is_made(f"recover {member.name}", recovery_key(run, member))
            assert (not run.data.awaits_texts, calibrated, trained) == expected
            assert run.folder.is_made("profile", profile_key(run))


@pytest.mark.slow
def test_a_killed_sampling_goes_on_and_one_shot_members_learn_from_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("runs"))
    table = {"table": str(finished / "runs" / "tiny" / "profile.json")}
    raw = without_text(folder, "one-shot", profile=table)
    genuine, sizes = TextSampler._batch, []

    def batch(self: TextSampler, size: int, seed: int) -> SampledTexts:
        sizes.append(size)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return genuine(self, size, seed)

    monkeypatch.setattr(TextSampler, "_batch", batch)
    with pytest.raises(KeyboardInterrupt):
        ziplm_deploy.recover(parse_recipe(raw))
    run_dir = folder / "runs" / "tiny"
    assert [path.name for path in run_dir.glob("sampling-*/*")] == ["0.json"]
    records = ziplm_deploy.recover(parse_recipe(raw))
    assert sizes[:3] == [24, sizes[1], sizes[1]]
    whole = read_texts(finished / "runs" / "tiny" / "sampled-texts")
    assert read_texts(run_dir / "sampled-texts").ids == whole.ids
    assert {name: (record.steps, record.lora_rank) for name, record in records.items()} == {
        "1.2x": (6, 4),
        "1.5x": (6, 4),
    }


@pytest.mark.slow
def test_a_profile_alone_needs_no_text(finished: Path, tmp_path: Path) -> None:
    raw = without_text(finished, profile={"table": str(finished / "runs" / "tiny" / "profile.json")})
    ziplm_deploy.profile(parse_recipe({**raw, "output_dir": str(tmp_path)}))
    assert not (tmp_path / "tiny" / "sampled-texts").exists()


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_any_work(finished: Path, tmp_path: Path) -> None:
    raw = {**without_text(finished), "output_dir": str(tmp_path)}
    wide = {**raw["recover"], "lora": {"rank": 64}}
    with pytest.raises(RecipeError, match=r"recover.lora.rank below 64, the hidden size"):
        run_pipeline(parse_recipe({**raw, "recover": wide}))
    with pytest.raises(DataError, match="one batch of 65 training examples, found 64"):
        run_pipeline(parse_recipe({**raw, "recover": {**raw["recover"], "batch_size": 65}}))
    bare = {key: value for key, value in raw["data"].items() if key != "generated"}
    with pytest.raises(DataError, match=r"expected data.calibration in the recipe, found none.*data.generated: \{\}"):
        run_pipeline(parse_recipe({**raw, "data": bare}))
    assert not (tmp_path / "tiny" / "profile.json").exists()
