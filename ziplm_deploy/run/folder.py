"""The folder of one run: resolved recipe, manifest, and stages that are skipped when their inputs did not change."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.info import versions
from ziplm_deploy.recipe import Recipe, member_name
from ziplm_deploy.run.manifest import Correction, Manifest
from ziplm_deploy.run.member import DENSE, Member, PrunedMember
from ziplm_deploy.tasks.lengths import TokenLengths

BETWEEN_STAGES = "between stages"


class RunFolder:
    """Paths of a run and the manifest that remembers which stage was run with which inputs."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_dir
        self._recipe = recipe
        self._manifest_path = self.path / "manifest.json"
        self._manifest = Manifest()
        self._began, self._in_stages = time.monotonic(), 0.0
        self._read()
        self.record(
            versions=versions(), argv=[Path(sys.argv[0]).name, *sys.argv[1:]], seed=recipe.seed, name=recipe.name
        )

    def _read(self) -> None:
        if os.path.exists(self._manifest_path):  # False for a name too long for any file
            self._manifest = Manifest.load(self._manifest_path)

    profile = property(lambda self: self.path / "profile.json")
    benchmark = property(lambda self: self.path / "benchmark.json")
    short_benchmark = property(lambda self: self.path / "benchmark-of-short-requests.json")
    dense_checkpoint = property(lambda self: self.path / "dense-checkpoint")
    refused_files = property(lambda self: self.path / "compression" / "refused.json")

    @property
    def dense_member(self) -> Member:
        """The dense model as a member."""
        return Member(DENSE, self.path, self._trains)

    def member(self, target: float) -> PrunedMember:
        """The member of a target."""
        return PrunedMember(member_name(target), self.path, self._trains, target)

    @property
    def _trains(self) -> bool:
        return self._recipe.recover.mode != "none"

    def checkpoints(self, name: str) -> Path:
        """Where a training leaves its checkpoints while it lasts."""
        return self.path / "recovery" / name

    def database(self, parent: str) -> Path:
        """Levels of the model that members are pruned from."""
        name = "database" if parent == DENSE else f"database-of-{parent}"
        return self.path / "pruning" / f"{name}.safetensors"

    def generation_benchmark(self, parent: str) -> Path:
        """Timings of the models pruned from ``parent``, as the closed loop took them."""
        return self.path / "pruning" / f"benchmark-of-{parent}.json"

    def settling(self, parent: str) -> Path:
        """Timings of drafts of the models to be pruned from ``parent``."""
        return self.path / "pruning" / f"settling-of-{parent}.json"

    def refused_of(self, parent: str) -> Path:
        """Names of the models pruned from ``parent`` whose files the engine cannot run."""
        return self.path / "pruning" / f"refused-of-{parent}.json"

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Wall time of every stage, all its runs in this folder together."""
        return dict(self._manifest.seconds)

    def record(self, **facts: Any) -> None:
        """Keep facts (data hashes, CPU) in the manifest; on disk when the first stage begins."""
        for name, value in facts.items():
            setattr(self._manifest, name, value)

    @property
    def notes(self) -> list[str]:
        """Warnings that the report repeats."""
        return list(self._manifest.notes.values())

    @property
    def lengths(self) -> dict[str, TokenLengths]:
        """Lengths of the texts of ``calibration`` and ``evaluation``, once they were counted; none of images."""
        return dict(self._manifest.lengths)

    def gzip_bytes(self, file_hash: str, compute: Callable[[], int] | None = None) -> int:
        """Compressed size of a file, computed once for each content and kept in the manifest; 0: not known yet."""
        known = self._manifest.gzip_bytes
        if file_hash not in known and compute is not None:
            known[file_hash] = compute()
            self.save()
        return known.get(file_hash, 0)

    def set_note(self, topic: str, text: str | None) -> None:
        """Replace the warning about a topic; None takes it back."""
        self._manifest.notes.pop(topic, None)
        if text is not None:
            self._manifest.notes[topic] = text
        self.save()

    def correction(self, name: str, key: str) -> Correction | None:
        """What the closed loop last asked for, if the member's inputs are still the same."""
        return self._manifest.corrections.get(name) if self._manifest.correction_keys.get(name) == key else None

    def set_correction(self, name: str, key: str, correction: Correction) -> None:
        """Remember what the closed loop asks for, and the inputs that it holds for."""
        self._manifest.corrections[name], self._manifest.correction_keys[name] = correction, key
        self.save()

    def unmake(self, stage: str) -> None:
        """Let a stage run again next time, though it ran to its end."""
        self._manifest.stages.pop(stage, None)
        self.save()

    def is_made(self, stage: str, key: str) -> bool:
        """Whether a stage ran to its end with these inputs."""
        return self._manifest.stages.get(stage) == key

    def make(
        self, stage: str, key: str, outputs: list[Path], work: Callable[[], None], *, together: bool = False
    ) -> bool:
        """Run ``work`` unless it ran before with the same ``key`` and its outputs are still there; True if it ran.

        Of several processes only the first works, and the others take what it wrote; ``together``: all of them work.
        """
        if distributed.n_processes() == 1:
            return self._make(stage, key, outputs, work)
        if together:
            distributed.wait()  # nobody may find the outputs that another one has just written
            ran = self._make(stage, key, outputs, work)
            distributed.wait()
            return ran
        with distributed.first_alone():
            if not distributed.is_first():
                self._read()
            ran = self._make(stage, key, outputs, work)
        distributed.wait()  # the first must not write what comes next while another still reads
        return ran

    def _make(self, stage: str, key: str, outputs: list[Path], work: Callable[[], None]) -> bool:
        if self.is_made(stage, key) and all(path.exists() for path in outputs):
            return False
        self._manifest.stages.pop(stage, None)
        self.save()  # from here on the outputs are in doubt, also for a run that is killed
        began = time.monotonic()
        try:
            work()
        finally:  # also of work that failed: the next save writes it
            spent = time.monotonic() - began
            self._in_stages += spent
            self._add_seconds(stage, spent)
        self._manifest.stages[stage] = key
        self.save()
        return True

    def _add_seconds(self, stage: str, seconds: float) -> None:
        self._manifest.seconds[stage] = round(self._manifest.seconds.get(stage, 0.0) + seconds, 2)

    def count_rest(self) -> None:
        """Count what this process spent beside its stages, loading and checking, so that times add up to the whole."""
        now = time.monotonic()
        self._add_seconds(BETWEEN_STAGES, now - self._began - self._in_stages)
        self._began, self._in_stages = now, 0.0

    def save(self) -> None:
        """Write the manifest and the recipe as resolved; nothing is on disk before the first stage begins."""
        if not distributed.is_first():
            return
        recipe = self._recipe.model_dump(mode="json")
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        self._manifest.save(self._manifest_path)
