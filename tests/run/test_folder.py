"""Stages are skipped when nothing changed, and only then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ziplm_deploy.artifacts import content_key, file_hash, source_hash
from ziplm_deploy.errors import CorruptArtifactError, StorageError
from ziplm_deploy.machine.info import versions
from ziplm_deploy.recipe import Environment, Recipe, parse_recipe
from ziplm_deploy.run.folder import BETWEEN_STAGES, RunFolder
from ziplm_deploy.run.manifest import Correction, Manifest


def _recipe(folder: Path, **changes: Any) -> Recipe:
    fields = {"name": "demo", "output_dir": folder, "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}
    return parse_recipe({**fields, **changes})


class Work:
    """Writes its output and counts its runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, 0

    def __call__(self) -> None:
        self.runs += 1
        self.path.write_text("done", encoding="utf-8")


def test_the_resolved_recipe_is_kept(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    folder = RunFolder(recipe)
    assert not folder.path.exists()  # bad data must leave nothing behind
    folder.save()
    assert parse_recipe(yaml.safe_load((folder.path / "recipe.yaml").read_text(encoding="utf-8"))) == recipe


def test_a_stage_runs_once_also_in_the_next_process(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    work = Work(folder.path / "out")
    assert folder.make("s", "key", [work.path], work) is True
    assert folder.make("s", "key", [work.path], work) is False
    assert RunFolder(_recipe(tmp_path)).make("s", "key", [work.path], work) is False
    assert work.runs == 1
    assert set(folder.stage_seconds) == {"s"}


def test_a_stage_runs_again_when_its_key_changes_or_its_output_is_gone(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    work = Work(folder.path / "out")
    folder.make("s", "key", [work.path], work)
    assert folder.make("s", "other", [work.path], work) is True
    work.path.unlink()
    assert folder.make("s", "other", [work.path], work) is True
    assert work.runs == 3


def test_seconds_of_a_stage_are_those_of_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 2.0, 9.0, 10.0, 13.0, 20.0, 21.0, 24.0, 25.0, 26.0])
    monkeypatch.setattr("ziplm_deploy.run.folder.time.monotonic", lambda: next(clock))
    folder = RunFolder(_recipe(tmp_path))
    folder.make("s", "first", [], lambda: None)
    again = RunFolder(_recipe(tmp_path))
    again.make("s", "second", [], lambda: None)
    assert again.stage_seconds == {"s": 5.0}
    with pytest.raises(ZeroDivisionError):
        again.make("s", "third", [], lambda: print(1 / 0))
    assert again.stage_seconds == {"s": 6.0}
    again.count_rest()  # of 15 s, 4 went into stages
    assert again.stage_seconds == {"s": 6.0, BETWEEN_STAGES: 11.0}
    again.count_rest()
    assert again.stage_seconds == {"s": 6.0, BETWEEN_STAGES: 12.0}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_stage_that_failed_runs_again(tmp_path: Path, failure: type[BaseException]) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    work = Work(folder.path / "out")
    folder.make("s", "old", [work.path], work)

    def fail() -> None:
        raise failure

    with pytest.raises(failure):
        folder.make("s", "new", [work.path], fail)
    assert RunFolder(_recipe(tmp_path)).make("s", "new", [work.path], work) is True


def test_a_later_failure_keeps_what_is_done(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    work = Work(folder.path / "out")
    folder.make("first", "key", [work.path], work)
    with pytest.raises(ZeroDivisionError):
        folder.make("second", "key", [], lambda: print(1 / 0))
    assert RunFolder(_recipe(tmp_path)).make("first", "key", [work.path], work) is False


def test_corrections_count_only_for_the_same_inputs(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    assert folder.correction("2x", "key") is None
    correction = Correction(
        2.1,
        1,
        [(2.0, 1.9)],
        float32_slowdown=1.2,
        float32_restarts=1,
        refused_plans=2,
        refused_speedup=2.05,
        settled=True,
    )
    assert all(getattr(correction, item.name) != item.default for item in dataclasses.fields(Correction))
    folder.set_correction("2x", "key", correction)
    assert RunFolder(_recipe(tmp_path)).correction("2x", "key") == correction
    assert folder.correction("2x", "other") is None
    assert folder.correction("3x", "key") is None


def test_a_forgotten_stage_runs_again(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    work = Work(folder.path / "out")
    folder.make("first", "key", [work.path], work)
    folder.unmake("first")
    folder.unmake("unknown")
    assert RunFolder(_recipe(tmp_path)).make("first", "key", [work.path], work) is True


@pytest.mark.parametrize(
    "content", ["", "{", '{"stages": ', "[1]", '{"kind": "manifest", "schema_version": 1, "stages": 3}']
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    (folder.path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"manifest .*in .*manifest\.json"):
        RunFolder(_recipe(tmp_path))


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("", encoding="utf-8")
    with pytest.raises(StorageError):
        RunFolder(_recipe(tmp_path)).save()


def test_manifest_tells_what_was_used(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path, seed=7))
    folder.record(model_hash="abc")
    folder.save()
    manifest = json.loads((folder.path / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["seed"], manifest["name"], manifest["model_hash"]) == (7, "demo", "abc")
    assert manifest["versions"] == versions()


def test_keys_depend_on_every_input_and_on_nothing_else() -> None:
    key = content_key(environment=Environment(threads=1), path=Path("a"), values=[1, 2])
    assert key == content_key(values=[1, 2], path=Path("a"), environment=Environment())
    assert key != content_key(values=[1, 2], path=Path("a"), environment=Environment(threads=2))
    assert key != content_key(values=[2, 1], path=Path("a"), environment=Environment())


def test_hashes_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}", encoding="utf-8")
    assert source_hash(str(file)) == file_hash(file)
    before = source_hash(str(tmp_path))
    (tmp_path / "notes.md").write_text("not read by any stage", encoding="utf-8")
    assert source_hash(str(tmp_path)) == before
    file.write_text('{"a": 1}', encoding="utf-8")
    assert source_hash(str(tmp_path)) != before
    assert source_hash("glue") == "glue"
    assert source_hash(None) == ""


def test_a_manifest_of_the_version_before_is_understood(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    before = {
        "stages": {"profile": "abc"},
        "seconds": {"profile": 2.5},
        "corrections": {
            "2x": {
                "key": "k",
                "predicted_target": 2.2,
                "count": 1,
                "history": [[2.0, 1.8]],
                "slowdown": 1.1,
                "rooms": 1,
                "sidesteps": 2,
                "floor": 2.1,
            }
        },
        "notes": {"topic": "text"},
        "name": "demo",
        "seed": 0,
    }
    (folder.path / "manifest.json").write_text(json.dumps(before), encoding="utf-8")
    again = RunFolder(_recipe(tmp_path))
    assert again.is_made("profile", "abc")
    assert again.stage_seconds == {"profile": 2.5}
    assert again.notes == ["text"]
    assert again.correction("2x", "k") == Correction(2.2, 1, [(2.0, 1.8)], 1.1, 1, 2, 2.1)
    again.save()
    assert Manifest.load(folder.path / "manifest.json").corrections == {"2x": again.correction("2x", "k")}


def test_outputs_are_looked_at_for_more_than_that_they_exist(tmp_path: Path) -> None:
    """After a power cut, files may be there and empty; those in a folder count, and what came later does not."""
    folder = RunFolder(_recipe(tmp_path))
    member = folder.path / "2x"

    def work() -> None:
        (member / "deep").mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "deep/config.json"):
            (member / name).write_text("{}", encoding="utf-8")

    assert folder.make("s", "key", [member], work)
    (member / "README.md").write_text("a card", encoding="utf-8")
    assert not RunFolder(_recipe(tmp_path)).make("s", "key", [member], work)
    (member / "README.md").unlink()
    assert RunFolder(_recipe(tmp_path)).is_made("s", "key")
    (member / "deep" / "config.json").write_text("", encoding="utf-8")
    assert not RunFolder(_recipe(tmp_path)).is_made("s", "key")
    assert RunFolder(_recipe(tmp_path)).make("s", "key", [member], work)
    (member / "tokenizer.json").unlink()
    assert not RunFolder(_recipe(tmp_path)).is_made("s", "key")


def test_versions_and_command_are_those_that_made_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1", "2"):
        monkeypatch.setattr("ziplm_deploy.run.folder.versions", lambda version=version: {"torch": version})
        monkeypatch.setattr("sys.argv", ["/bin/ziplm-deploy", f"command {version}"])
        folder = RunFolder(_recipe(tmp_path))
        folder.make("old", "key", [], lambda: None)
        folder.make("new", f"key {version}", [], lambda: None)
    assert folder.stage_versions == {"old": {"torch": "1"}, "new": {"torch": "2"}}
    manifest = Manifest.load(folder.path / "manifest.json")
    assert manifest.origins["old"].argv == ["ziplm-deploy", "command 1"]


def test_what_is_about_a_member_goes_when_it_is_not_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path, speedups=[2, 3.5]))
    folder.set_note("data", "of all")
    folder.set_note("refit", "of 3.5x", member="3.5x")
    folder.set_note("refit", "of 2x", member="2x")
    for stage in ("profile", "evaluate dense", "zero 3.5x, 1", "prune 2x", "export 3.5x sparse"):
        folder.make(stage, "key", [], lambda: None)
    assert folder.notes == ["of all", "of 3.5x", "of 2x"]
    without = RunFolder(_recipe(tmp_path))
    assert without.notes == ["of all", "of 2x"]
    assert set(without.stage_seconds) == set(without.stage_versions) == {"profile", "evaluate dense", "prune 2x"}
    without.set_note("refit", None, member="2x")
    assert without.notes == ["of all"]
    assert RunFolder(_recipe(tmp_path, speedups=[3.5])).notes == ["of all", "of 3.5x"]


def test_measuring_again_keeps_the_aim_and_forgets_what_was_measured(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    before = Correction(2.1, 3, [(2.0, 1.9)], 1.2, 1, refused_plans=2, refused_speedup=2.05)
    for name in ("2x", "9x"):
        folder.set_correction(name, "key", before)
    for stage in ("benchmark", "benchmark of dense", "profile", "prune 2x"):
        folder.make(stage, "key", [], lambda: None)
    folder.settling.parent.mkdir(exist_ok=True)
    folder.settling.write_text("{}", encoding="utf-8")
    folder.forget_measurements()
    again = RunFolder(_recipe(tmp_path))
    made = {stage: again.is_made(stage, "key") for stage in ("benchmark", "benchmark of dense", "profile", "prune 2x")}
    assert made == {"benchmark": False, "benchmark of dense": False, "profile": True, "prune 2x": True}
    assert again.correction("2x", "key") == Correction(2.1, float32_slowdown=1.2, refused_plans=2, refused_speedup=2.05)
    assert not again.settling.exists()
    assert again.correction("9x", "key") == before  # not asked for


def test_a_manifest_of_schema_1_is_understood(tmp_path: Path) -> None:
    folder = RunFolder(_recipe(tmp_path))
    folder.save()
    before = {
        "kind": "manifest",
        "schema_version": 1,
        "stages": {"profile": "abc"},
        "versions": {"torch": "1"},
        "argv": ["ziplm-deploy", "run"],
        "notes": {"sidesteps of 3x": "old", "refit of 2x": "member", "refused cells": "text"},
    }
    (folder.path / "manifest.json").write_text(json.dumps(before), encoding="utf-8")
    again = RunFolder(_recipe(tmp_path))
    assert again.is_made("profile", "abc")
    assert again.notes == ["text", "member"]
    assert again.stage_versions == {"profile": {"torch": "1"}}


def test_checkpoints_of_one_training_go_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(_recipe(tmp_path))
    keys = {key: content_key(key=key) for key in ("now", "before")}
    own = [folder.checkpoints("2x", key) for key in keys.values()]
    monkeypatch.setenv("WORLD_SIZE", "4")
    own.append(folder.checkpoints("2x", keys["now"]))
    monkeypatch.delenv("WORLD_SIZE")
    assert len(set(own)) == 3  # a step of four processes is another one than a step of one
    others = [folder.checkpoints(name, keys["now"]) for name in ("2x-sparse-1", "12x", "2x-int8")]
    for path in (*own, *others):
        (path / "checkpoint-5").mkdir(parents=True)
    folder.drop_checkpoints("2x")
    assert [path.exists() for path in (*own, *others)] == [False] * 3 + [True] * 3
    for name in ("2x-sparse-1", "12x", "2x-int8"):
        folder.drop_checkpoints(name)
    assert not (folder.path / "recovery").exists()
