"""What stands for the weights of a run's model."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from ziplm_deploy.run.dense import model_hash


def in_cache(hub: Path, commit: str) -> None:
    """A model of the hub as it was at a commit, which is the newest one."""
    repository = hub / "models--tiny--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}", encoding="utf-8")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")


def test_a_hub_id_stands_for_the_commit_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    first, second = "1" * 40, "2" * 40
    in_cache(tmp_path, first)
    assert model_hash("tiny/model") == f"tiny/model@{first}"
    in_cache(tmp_path, second)
    assert model_hash("tiny/model") == f"tiny/model@{second}"
    assert model_hash("tiny/model", first) == f"tiny/model@{first}"


def test_what_the_cache_does_not_know_stands_for_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_hash("tiny/other") == "tiny/other"
    assert model_hash("tiny/other", "v1") == "tiny/other@v1"


def test_a_folder_stands_for_what_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = model_hash(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert model_hash(str(tmp_path)) != before
