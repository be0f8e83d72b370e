"""Every field of a recipe repeats exactly these stages: a field that is missing in a key would fail in silence.

A finished run is resumed with one field changed, and stages say whether they would be made again. What a stage makes
stays as it was, so that the table shows which keys hold a field themselves, not what follows from other files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.helpers.models import save_dense
from tests.helpers.pipeline import raw_recipe, write_rows
from ziplm_deploy import pipeline
from ziplm_deploy.machine import info
from ziplm_deploy.machine.side_environments import SideEnvironment
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.stages import benchmark, closed_loop, evaluate

BASE: dict[str, Any] = {
    "dense": {"train": True, "max_steps": 1, "batch_size": 8},
    "recover": {"mode": "one-shot", "max_steps": 1, "batch_size": 8},
    "compress": {
        "variants": ["int8", "sparse", "sparse-int8"],
        "int8": {"method": "static", "n_calibration": 8},
        "train": {"mode": "distil", "max_steps": 1, "batch_size": 8},
    },
    "speedups": [1.5],
}
FROM_DENSE = {"train dense", "calibrate", "prune", "recover", "export", "sparsify"}  # what the dense model's hash is in
EXAMPLES = {"calibrate", "prune", "sparsify", "quantise"}  # what calibration examples are in
TRAINING = {"recover", "sparsify"}
FILES = {"export", "export pruned", "export sparse"}
TIMED = {"benchmark", "benchmark of"}
SCORED = {"evaluate", "evaluate pruned"}
EVERYTHING = {*FROM_DENSE, *EXAMPLES, *FILES, *SCORED}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, and a finished run that trains its dense model, prunes, recovers and compresses."""
    folder = tmp_path_factory.mktemp("keys")
    for name, seed in (("model", 0), ("other-model", 1)):
        save_dense(folder / name, task="text-classification", num_hidden_layers=1, seed=seed)
    for name, seed in (("train", 0), ("test", 1), ("other", 2)):
        write_rows(folder / f"{name}.jsonl", 40, seed)
    pipeline.run_pipeline(parse_recipe(raw_recipe(folder, **BASE)))
    shutil.copy(folder / "runs" / "tiny" / "profile.json", folder / "table.json")
    return folder


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {**raw, head: changed(raw.get(head, {}), rest, value) if rest else value}


def plain(stage: str) -> str:
    """A stage without the member and the variant that it is about."""
    if stage == "train dense":
        return stage
    words = re.sub(r",? ?\d+$", "", re.sub(r"\b(dense|1\.5x)\b", "", stage)).split()
    kept = [word for word in words if word not in ("int8", "sparse-int8")]
    name = " ".join(kept)
    return {"zero": "sparsify", "train sparse": "sparsify", "evaluate sparse": "evaluate"}.get(name, name)


def repeated(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, value: Any) -> set[str]:
    """Stages that would be made again in a finished run if this field changed."""
    found: set[str] = set()
    make = RunFolder._make

    def ask(
        self: RunFolder, stage: str, key: str, outputs: list[Path], work: Callable[[], None], together: bool = False
    ) -> bool:
        if self.is_made(stage, key) and all(output.exists() for output in outputs):
            return False
        found.add(plain(stage))
        return make(self, stage, key, outputs, work) if not all(output.exists() for output in outputs) else False

    monkeypatch.setattr(RunFolder, "make", ask)
    monkeypatch.setattr(closed_loop, "correct", lambda run, member, record: False)
    monkeypatch.setattr(info, "usable_cores", lambda: 64)
    monkeypatch.setattr(SideEnvironment, "check", lambda self: None)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    value = str(finished / value.removeprefix("@")) if isinstance(value, str) and value.startswith("@") else value
    raw = {**raw_recipe(finished, **BASE), "output_dir": str(tmp_path / "runs")}
    run = pipeline.begin(parse_recipe(changed(raw, path, value)))
    pipeline.build(run)
    benchmark.STAGE(run)
    evaluate.STAGE(run)
    return found


# field: another value ("@" stands for the folder of the data), and the stages that it repeats
TABLE: dict[str, tuple[Any, set[str]]] = {}
# Not in the table, because they are another run, not another version of this one.
ANOTHER_RUN = {"name", "output_dir", "speedups"}


def test_an_unchanged_recipe_repeats_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeated(finished, tmp_path, monkeypatch, "benchmark.tolerance", 0.02) == set()


def test_the_table_has_every_field() -> None:
    assert set(TABLE) == set(leaves(Recipe)) - ANOTHER_RUN


@pytest.mark.parametrize("path", TABLE)
def test_a_field_repeats_exactly_these_stages(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    value, expected = TABLE[path]
    assert repeated(finished, tmp_path, monkeypatch, path, value) == expected
