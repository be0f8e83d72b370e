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
