"""The folder of one run: resolved recipe, manifest, and stages that are skipped when their inputs did not change."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ziplm_deploy.artifacts import parts_of, write_text
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.info import versions
from ziplm_deploy.models.sentence_files import SETTINGS_FILE
from ziplm_deploy.recipe import Recipe, member_name
from ziplm_deploy.run.manifest import Correction, Manifest, Origin
from ziplm_deploy.run.member import DENSE, Member, PrunedMember
from ziplm_deploy.tasks.lengths import TokenLengths

BETWEEN_STAGES = "between stages"
KEY_DIGITS = 12  # of a training's key, in the name of its checkpoints' folder


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
    retrieval = property(lambda self: self.path / "retrieval")
    retrieval_scores = property(lambda self: self.path / "retrieval.json")
    uncertainty = property(lambda self: self.path / "uncertainty.json")
    sampled_texts = property(lambda self: self.path / "sampled-texts")
    settling = property(lambda self: self.path / "pruning" / "settling.json")
    refused_files = property(lambda self: self.path / "compression" / "refused.json")
    linear_times = property(lambda self: self.path / "compression" / "linear-times.json")

    @property
    def dense_member(self) -> Member:
        """The dense model as a member."""
        return Member(DENSE, self.path, self._trains, exported=self._recipe.exported)

    @property
    def dense_trained_on(self) -> Member:
        """The dense model after the training that members have."""
        return Member("dense-trained-on", self.path / "recovery", self._trains)

    def member(self, target: float) -> PrunedMember:
        """The member of a target."""
        return PrunedMember(member_name(target), self.path, self._trains, target, exported=self._recipe.exported)

    @property
    def _trains(self) -> bool:
        return self._recipe.recover.mode != "none"

    def checkpoints(self, training: str, key: str) -> Path:
        """Where a training leaves its checkpoints while it lasts.

        Other folders for other numbers of processes: a step of theirs is of another number of examples.
        """
        n_processes = distributed.n_processes()
        share = "" if n_processes == 1 else f"-of-{n_processes}"
        return self.path / "recovery" / f"{training}-{key[:KEY_DIGITS]}{share}"

    def drop_checkpoints(self, training: str) -> None:
        """Remove what a training that is over has left, also under other settings. Call it when its stage is made."""
        if not distributed.is_first():
            return
        own = re.compile(rf"{re.escape(training)}-[0-9a-f]{{{KEY_DIGITS}}}(-of-\d+)?")
        for folder in (self.path / "recovery").glob("*"):
            if own.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another training's are in there, or there were none
            (self.path / "recovery").rmdir()

    def sampling(self, key: str) -> Path:
        """Where the sampling of texts leaves its batches while it lasts."""
        return self.path / f"sampling-{key[:KEY_DIGITS]}"

    def drop_samplings(self) -> None:
        """Remove batches of sampled texts, also those of other settings. Call it when the texts are made."""
        if distributed.is_first():
            for folder in self.path.glob("sampling-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def database(self, parent: str) -> Path:
        """Levels of the model that members are pruned from."""
        name = "database" if parent == DENSE else f"database-of-{parent}"
        return self.path / "pruning" / f"{name}.safetensors"

    def generation_benchmark(self, parent: str) -> Path:
        """Timings of the models pruned from ``parent``, as the closed loop took them."""
        return self.path / "pruning" / f"benchmark-of-{parent}.json"

    def refused_of(self, parent: str) -> Path:
        """Names of the models pruned from ``parent`` whose files the engine cannot run."""
        return self.path / "pruning" / f"refused-of-{parent}.json"

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Wall time of every stage, all its runs in this folder together."""
        return {stage: spent for stage, spent in self._manifest.seconds.items() if self._is_asked_for(stage)}

    @property
    def stage_versions(self) -> dict[str, dict[str, str]]:
        """Versions of the packages that every stage was made with."""
        origins = self._manifest.origins.items()
        return {stage: dict(origin.versions) for stage, origin in origins if self._is_asked_for(stage)}

    @property
    def _member_names(self) -> set[str]:
        return {DENSE, *map(member_name, self._recipe.speedups)}

    def _is_asked_for(self, stage: str) -> bool:
        """Whether a stage is of no member that the recipe does not ask for (any more)."""
        return set(re.findall(r"(?<!\S)\d\S*?x(?![^\s,])", stage)) <= self._member_names

    def record(self, **facts: Any) -> None:
        """Keep facts (data hashes, CPU) in the manifest; on disk when the first stage begins."""
        for name, value in facts.items():
            setattr(self._manifest, name, value)

    @property
    def notes(self) -> list[str]:
        """Warnings that the report repeats."""
        of_members = self._manifest.notes_of_members
        own = [text for name in of_members if name in self._member_names for text in of_members[name].values()]
        return [*self._manifest.notes.values(), *own]

    @property
    def lengths(self) -> dict[str, TokenLengths]:
        """Lengths of the texts of ``calibration`` and ``evaluation``, once they were counted; none of images."""
        return dict(self._manifest.lengths)

    def gzip_bytes(self, file_hash: str) -> int:
        """Compressed size of a file, by its content; 0: not known yet."""
        return self._manifest.gzip_bytes.get(file_hash, 0)

    def set_gzip_bytes(self, file_hash: str, size: int) -> None:
        """Keep the compressed size of a content."""
        self._manifest.gzip_bytes[file_hash] = size
        self.save()

    def set_note(self, topic: str, text: str | None, *, member: str | None = None) -> None:
        """Replace the warning about a topic; None takes it back. One of a ``member`` goes when the member does."""
        notes = self._manifest.notes if member is None else self._manifest.notes_of_members.setdefault(member, {})
        if notes.get(topic) == text:
            return
        notes.pop(topic, None)
        if text is not None:
            notes[topic] = text
        self.save()

    def set_difference(self, stage: str, difference: float) -> None:
        """Remember how far the file of the stage that is being made is from torch."""
        self._manifest.differences[stage] = difference

    def difference(self, stage: str) -> float | None:
        """How far a stage's file was from torch when it was made; None where nothing was compared."""
        return self._manifest.differences.get(stage)

    def correction(self, name: str, key: str) -> Correction | None:
        """What the closed loop last asked for, if the member's inputs are still the same."""
        return self._manifest.corrections.get(name) if self._manifest.correction_keys.get(name) == key else None

    def set_correction(self, name: str, key: str, correction: Correction) -> None:
        """Remember what the closed loop asks for, and the inputs that it holds for."""
        self._manifest.corrections[name], self._manifest.correction_keys[name] = correction, key
        self.save()

    def forget_measurements(self) -> None:
        """Let everything be timed again, and the closed loop begin with what it asks for now, with no history.

        Plans stay as they are until a new timing says otherwise.
        """
        for stage in [stage for stage in self._manifest.stages if re.match(r"(benchmark|settle)( .*)?$", stage)]:
            del self._manifest.stages[stage]
        corrections = self._manifest.corrections
        for name in self._member_names.intersection(corrections):
            corrections[name] = corrections[name].without_history()
        self._manifest.ended_loop = None
        self.settling.unlink(missing_ok=True)  # drafts are timed again, too
        self.save()

    @property
    def ended_loop(self) -> str | None:
        """Key of the benchmark of all files that satisfied the loop around it; None where there was no such loop."""
        return self._manifest.ended_loop

    def set_ended_loop(self, key: str) -> None:
        """Remember that a benchmark ended the loop around it, so that another one is reported."""
        self._manifest.ended_loop = key
        self.save()

    def unmake(self, stage: str) -> None:
        """Let a stage run again next time, though it ran to its end."""
        self._manifest.stages.pop(stage, None)
        self.save()

    def is_made(self, stage: str, key: str) -> bool:
        """Whether a stage ran to its end with these inputs, and what it made is still there, and of the same size."""
        return self._manifest.stages.get(stage) == key and self._is_whole(stage)

    def _is_whole(self, stage: str) -> bool:
        made = self._manifest.outputs.get(stage, {})
        # Prompts of queries and passages change no answers; they are written anew.
        paths = {self.path / name: size for name, size in made.items() if not name.endswith(f"/{SETTINGS_FILE}")}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def make(
        self, stage: str, key: str, outputs: list[Path], work: Callable[[], None], *, together: bool = False
    ) -> bool:
        """Run ``work`` unless it ran before with the same ``key`` and its outputs are still there; True if it ran.

        An output is a file, or a folder with all that is in it when the work is done.

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
        for facts in (self._manifest.stages, self._manifest.outputs, self._manifest.differences):
            facts.pop(stage, None)
        self.save()  # from here on the outputs are in doubt, also for a run that is killed
        began = time.monotonic()
        try:
            work()
        finally:  # also of work that failed: the next save writes it
            spent = time.monotonic() - began
            self._in_stages += spent
            self._add_seconds(stage, spent)
        self._manifest.stages[stage] = key
        self._manifest.origins[stage] = Origin(self._manifest.versions, self._manifest.argv)
        if distributed.is_first():  # the others may be done before it has written
            self._manifest.outputs[stage] = {
                str(path.relative_to(self.path)): path.stat().st_size for path in _files(outputs)
            }
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
        write_text(self.path / "recipe.yaml", self._recipe_text)
        self._manifest.save(self._manifest_path)

    @functools.cached_property
    def _recipe_text(self) -> str:
        """The recipe as resolved, in YAML, which is slow to write; a run saves dozens of times."""
        text: str = yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False)
        return text


def _files(outputs: list[Path]) -> Iterator[Path]:
    """Files among outputs with their parts, and all in the folders among them."""
    for output in outputs:
        inside = sorted(output.rglob("*")) if output.is_dir() else parts_of(output)
        yield from (path for path in inside if path.is_file())
