"""The folder of one run: resolved recipe, manifest, and stages that are skipped when their inputs did not change."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.info import versions
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.run.correction import Correction


class RunFolder:
    """Paths of a run and the manifest that remembers which stage was run with which inputs."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_dir
        self._recipe = recipe
        self._manifest_path = self.path / "manifest.json"
        self._manifest: dict[str, Any] = {"stages": {}, "seconds": {}, "corrections": {}, "notes": {}}
        self._read()
        self._manifest.update(
            versions=versions(), argv=[Path(sys.argv[0]).name, *sys.argv[1:]], seed=recipe.seed, name=recipe.name
        )

    def _read(self) -> None:
        if not self._manifest_path.exists():
            return
        try:
            self._manifest.update(json.loads(self._manifest_path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CorruptArtifactError(
                f"expected JSON in {self._manifest_path}, found: {error}; delete the file to run every stage again"
            ) from error

    profile = property(lambda self: self.path / "profile.json")
    benchmark = property(lambda self: self.path / "benchmark.json")
    dense_checkpoint = property(lambda self: self.path / "dense-checkpoint")

    def member(self, name: str) -> Path:
        return self.path / name

    def pruned(self, name: str) -> Path:
        """Where a member lies before it is trained; the member's own folder if it never is."""
        return self.member(name) if self._recipe.recover.mode == "none" else self.path / "pruning" / name

    def stand_in(self, name: str, variant: str) -> Path:
        """ONNX file as fast as a member's variant will be, with other weights: what the closed loop measures."""
        return self.path / "pruning" / f"{name}-{variant}.onnx"

    def compressed(self, name: str) -> Path:
        """Sparse checkpoint and records of how a member's variants were made."""
        return self.path / "compression" / name

    def database(self, parent: str) -> Path:
        """Levels of the model that members are pruned from."""
        name = "database" if parent == "dense" else f"database-of-{parent}"
        return self.path / "pruning" / f"{name}.safetensors"

    def step_benchmark(self, parent: str) -> Path:
        """Timings of the models pruned from ``parent``; the final ones if nothing changes them."""
        before_training = self.path / "pruning" / f"benchmark-of-{parent}.json"
        return before_training if self._recipe.finishes_after_pruning else self.benchmark

    def plan(self, name: str) -> Path:
        return self.path / "pruning" / f"{name}.json"

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of every stage, when it last ran."""
        return dict(self._manifest["seconds"])

    def record(self, **facts: Any) -> None:
        """Keep facts (data hashes, CPU) in the manifest; on disk when the first stage begins."""
        self._manifest.update(facts)

    @property
    def notes(self) -> list[str]:
        """Warnings that the report repeats."""
        return list(self._manifest["notes"].values())

    def remembered(self, topic: str, key: str, compute: Callable[[], int]) -> int:
        """A number that is computed once for each key and kept in the manifest."""
        known: dict[str, int] = self._manifest.setdefault(topic, {})
        if key not in known:
            known[key] = compute()
            self.save()
        return known[key]

    def set_note(self, topic: str, text: str | None) -> None:
        """Replace the warning about a topic; None takes it back."""
        self._manifest["notes"].pop(topic, None)
        if text is not None:
            self._manifest["notes"][topic] = text
        self.save()

    def correction(self, name: str, key: str) -> Correction | None:
        """What the closed loop last asked for, if the member's inputs are still the same."""
        entry = self._manifest["corrections"].get(name)
        if not entry or entry["key"] != key:
            return None
        history = [(float(aim), float(measured)) for aim, measured in entry["history"]]
        known = {item.name for item in fields(Correction)} - {"history"}
        return Correction(history=history, **{name: entry[name] for name in known if name in entry})

    def set_correction(self, name: str, key: str, correction: Correction) -> None:
        self._manifest["corrections"][name] = {"key": key, **asdict(correction)}
        self.save()

    def forget(self, stage: str) -> None:
        """Let a stage run again next time, though it ran to its end."""
        self._manifest["stages"].pop(stage, None)
        self.save()

    def is_current(self, name: str, key: str) -> bool:
        """Whether a stage ran to its end with these inputs."""
        return bool(self._manifest["stages"].get(name) == key)

    def stage(
        self, name: str, key: str, outputs: list[Path], work: Callable[[], None], *, together: bool = False
    ) -> bool:
        """Run ``work`` unless it ran before with the same ``key`` and its outputs are still there; True if it ran.

        Of several processes only the first works, and the others take what it wrote; ``together``: all of them work.
        """
        if distributed.n_processes() == 1:
            return self._stage(name, key, outputs, work)
        if together:
            distributed.wait()  # nobody may find the outputs that another one has just written
            ran = self._stage(name, key, outputs, work)
            distributed.wait()
            return ran
        with distributed.first_alone():
            if not distributed.is_first():
                self._read()
            ran = self._stage(name, key, outputs, work)
        distributed.wait()  # the first must not write what comes next while another still reads
        return ran

    def _stage(self, name: str, key: str, outputs: list[Path], work: Callable[[], None]) -> bool:
        if self.is_current(name, key) and all(path.exists() for path in outputs):
            return False
        self._manifest["stages"].pop(name, None)
        self.save()  # from here on the outputs are in doubt, also for a run that is killed
        began = time.monotonic()
        work()
        self._manifest["stages"][name] = key
        self._manifest["seconds"][name] = round(time.monotonic() - began, 2)
        self.save()
        return True

    def save(self) -> None:
        """Write the manifest and the recipe as resolved; nothing is on disk before the first stage begins."""
        if not distributed.is_first():
            return
        recipe = self._recipe.model_dump(mode="json")
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        write_text(self._manifest_path, json.dumps(self._manifest, indent=1) + "\n")
