"""What the stages of one run share, made once and when it is first asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ziplm_deploy.artifacts import file_hash, parts_of
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import machine_info, usable_cores
from ziplm_deploy.machine.memory import keep_freed_memory
from ziplm_deploy.machine.scratch import remove_abandoned
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.models.gguf_export import GgufExport
from ziplm_deploy.models.gguf_source import gguf_file_of
from ziplm_deploy.models.member_files import load
from ziplm_deploy.models.own_settings import completed
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.parent import Parent
from ziplm_deploy.recipe import EngineName, Recipe
from ziplm_deploy.recovery.teacher import Teacher, make_teacher
from ziplm_deploy.recovery.teacher_model import load_teacher
from ziplm_deploy.run.answers import KnownAnswers
from ziplm_deploy.run.data import RunData
from ziplm_deploy.run.dense import model_hash
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.run.lock import RunLock
from ziplm_deploy.run.member import Member, PrunedMember
from ziplm_deploy.run.workload import with_counted_lengths
from ziplm_deploy.tasks import Task, get_task


@dataclass(frozen=True)
class Generation:
    """Members that are pruned from one parent, measured and trained before the next generation begins."""

    parent: Member  # the dense model, or the member that a gradual run prunes further
    members: tuple[PrunedMember, ...]

    @property
    def names(self) -> str:
        return ", ".join(member.name for member in self.members)


class Run:
    """Recipe, folder, progress, members. Attributes are computed on first use: a resumed run loads what it needs.

    Its folder is locked until it is closed; use it as a context manager.

    Raises:
        FolderInUseError: another run is in the folder.
    """

    def __init__(self, recipe: Recipe, progress: Progress | None = None) -> None:
        torch.set_num_threads(usable_cores())
        keep_freed_memory()
        self.progress = progress or Progress()
        self._lock = RunLock(recipe.run_dir, self.progress.note)
        try:
            remove_abandoned()
            self._open(recipe)
        except BaseException:
            self._lock.release()
            raise

    @property
    def learns_classes(self) -> bool:
        """Whether a loss of the training reads labels that are classes."""
        return self.task.has_classes and self.data.trains_on_labels

    def _open(self, recipe: Recipe) -> None:
        own = read_sentence_modules(recipe.model)
        self.names_pooling = (recipe.model.pooling or own.pooling) is not None  # recipe or files of the model
        self.truncated = own.truncated  # numbers of an embedding that its own loader keeps
        recipe = recipe.model_copy(update={"model": completed(recipe.model, own)})
        self.task: Task = get_task(recipe.model)
        self.recipe = recipe = with_counted_lengths(recipe, self.task, self.progress.note)
        self.folder = RunFolder(recipe)
        self.data = RunData(recipe, self.task, self.folder, own)
        self.dense = self.data.dense
        self.n_stages = 0  # how many will be announced
        self._parent: Parent | None = None
        self._hashes: dict[Path, tuple[Any, str]] = {}  # state of a file when its hash was computed
        self._announced = 0
        self.folder.record(
            model_hash=self.dense.base_hash,
            calibration_hash=self.data.calibration_hash,
            evaluation_hash=self.data.evaluation_hash,
            train_hash=self.data.train_hash if self.trains or recipe.compress.trains else "",
            machine=machine_info().model_dump(mode="json"),
        )

    def close(self) -> None:
        """Let other runs into the folder; safe to call twice."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def announce(self, stage: str, what: str) -> None:
        """Show on the console that a stage begins."""
        self._announced += 1
        self.progress.stage(f"{stage}: {what}", self._announced, max(self.n_stages, self._announced))

    @property
    def trains(self) -> bool:
        """Whether members are trained after pruning."""
        return self.recipe.recover.mode != "none"

    @functools.cached_property
    def dense_member(self) -> Member:
        return self.folder.dense_member

    @functools.cached_property
    def pruned_members(self) -> tuple[PrunedMember, ...]:
        """The members by target."""
        return tuple(map(self.folder.member, self.recipe.speedups))

    @property
    def members(self) -> tuple[Member, ...]:
        """The dense model first, then the members by target."""
        return (self.dense_member, *self.pruned_members)

    @functools.cached_property
    def generations(self) -> list[Generation]:
        """The schedule: all members from the dense model, or each from the member trained before it."""
        if self.recipe.recover.mode != "gradual":
            return [Generation(self.dense_member, self.pruned_members)]
        parents = self.members[:-1]
        return [Generation(parent, (member,)) for parent, member in zip(parents, self.pruned_members, strict=True)]

    def generation_of(self, member: PrunedMember) -> Generation:
        return next(generation for generation in self.generations if member in generation.members)

    def parent_of(self, member: PrunedMember) -> Parent:
        """What a member is pruned from; only the last one asked for stays in memory."""
        return self.parent(self.generation_of(member).parent)

    def parent(self, member: Member) -> Parent:
        """A member as a parent; only the last one asked for stays in memory."""
        if self._parent is None or self._parent.name != member.name:
            self._parent = Parent(
                member.name,
                self.folder.database(member.name),
                load=lambda: self.dense.model if member.is_dense else load(member.folder),
                table=lambda: self.table,
                calibration=lambda: self.data.calibration,
                task=self.task,
                recipe=self.recipe,
            )
        return self._parent

    @functools.cached_property
    def engine_versions(self) -> dict[EngineName, str]:
        """Version of the engine that serves, and of the baseline's; asking takes a process where it has its own
        environment."""
        names = (self.recipe.environment.engine, self.recipe.baseline_engine)
        return {name: get_engine(name).version() for name in dict.fromkeys(names)}

    @property
    def model_settings(self) -> dict[str, Any]:
        """Settings of the model that results depend on, of the recipe and of the model itself."""
        return self.data.model_settings

    @property
    def teacher_hash(self) -> str:
        """Stands for the teacher's weights."""
        teacher = self.recipe.recover.teacher
        return self.dense.hash if teacher is None else model_hash(teacher)

    @functools.cached_property
    def table(self) -> LatencyTable:
        return LatencyTable.load(self.folder.profile)

    @functools.cached_property
    def onnx_export(self) -> OnnxExport:
        return OnnxExport.from_recipe(self.recipe, self.task)

    @functools.cached_property
    def gguf_export(self) -> GgufExport:
        """How models become GGUF files; the recipe asks for some.

        A tokenizer is copied as it is from the GGUF file that the model came from, if there is one.
        """
        file_type = self.recipe.export.gguf
        assert file_type is not None
        return GgufExport(self.recipe.name, file_type, gguf_file_of(self.recipe.model.path) or self.dense.processor)

    @functools.cached_property
    def answers(self) -> KnownAnswers:
        """Answers on the evaluation examples that a later stage needs again."""
        return KnownAnswers(self.recipe.environment, self.task, self.data)

    @functools.cached_property
    def teacher_model(self) -> nn.Module:
        """The model that members learn from: the dense one unless the recipe names another."""
        return load_teacher(self.recipe, self.dense.model, self.dense.processor)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher with what it has answered already, one for all members."""
        return make_teacher(self.teacher_model, self.task, self.data.examples, self.recipe.recover)

    def file_hash(self, path: Path) -> str:
        """Hash of an output of an earlier stage; read again only if the file was written since.

        Raises:
            CorruptArtifactError: it is missing.
        """
        if not path.is_file():
            raise CorruptArtifactError(f"expected {path} from an earlier stage, found none; run all stages again")
        facts = [part.stat() for part in parts_of(path)]
        state = tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in facts)
        known = self._hashes.get(path)
        if known is None or known[0] != state:
            known = self._hashes[path] = (state, file_hash(path))
        return known[1]
