"""The state of one run: recipe, folder, and what several stages need, made once and when it is first asked for."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ziplm_deploy.artifacts import content_key, file_hash, source_hash
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import machine_info, usable_cores
from ziplm_deploy.machine.memory import keep_freed_memory
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.models.shape import ModelShape
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.parent import DENSE, Parent
from ziplm_deploy.pruning.planner import Calibration
from ziplm_deploy.recipe import EngineName, Recipe
from ziplm_deploy.run.folder import RunFolder
from ziplm_deploy.tasks import EvaluationSet, Task, get_task
from ziplm_deploy.tasks.batching import Batch
from ziplm_deploy.tasks.evaluation_set import BATCH_SIZE

if TYPE_CHECKING:
    from ziplm_deploy.recovery.examples import Examples
    from ziplm_deploy.recovery.teacher import Teacher


@dataclass(frozen=True)
class Step:
    """Targets that are pruned from one parent, measured and trained before the next step begins."""

    parent: str  # "dense", or the member that a gradual run prunes further
    targets: tuple[float, ...]


class Run:
    """What the stages share. Attributes are computed on first use, so a resumed run loads only what it needs."""

    def __init__(self, recipe: Recipe, progress: Progress | None = None) -> None:
        torch.set_num_threads(usable_cores())
        keep_freed_memory()
        self.recipe = recipe
        self.progress = progress or Progress()
        self.folder = RunFolder(recipe)
        self.task: Task = get_task(recipe.model)
        revision = f"@{recipe.model.revision}" if recipe.model.revision else ""
        self.base_hash = source_hash(resolve_model_path(recipe.model.path)) + revision
        self.calibration_hash = source_hash(recipe.data.calibration)
        self.evaluation_hash = source_hash(recipe.data.evaluation)
        self.train_hash = source_hash(recipe.data.train or recipe.data.calibration)
        self._parent: Parent | None = None
        self._begun = 0
        self.folder.record(
            model_hash=self.base_hash,
            calibration_hash=self.calibration_hash,
            evaluation_hash=self.evaluation_hash,
            train_hash=self.train_hash if self.trains or recipe.compress.trains else "",
            machine=machine_info().model_dump(mode="json"),
        )

    def begin(self, stage: str, what: str) -> None:
        """Announce a stage; how many there are depends on the recipe."""
        self._begun += 1
        of_step, once = (5, 4) if self.trains else (4, 3)  # see pipeline.py
        compresses, finishes = bool(self.recipe.compress.variants), self.recipe.finishes_after_pruning
        total = once + of_step * len(self.steps) + self.recipe.dense.train + compresses + finishes
        self.progress.stage(f"{stage}: {what}", self._begun, max(total, self._begun))

    @property
    def trains(self) -> bool:
        """Whether members are trained after pruning."""
        return self.recipe.recover.mode != "none"

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The schedule: all targets from the dense model, or each from the member trained before it."""
        targets = self.recipe.speedups
        if self.recipe.recover.mode != "gradual":
            return [Step(DENSE, targets)]
        parents = [DENSE, *map(self.member_name, targets[:-1])]
        return [Step(parent, (target,)) for parent, target in zip(parents, targets, strict=True)]

    def parent_of(self, target: float) -> Parent:
        """What the member of a target is pruned from; only the last one asked for stays in memory."""
        name = next(step.parent for step in self.steps if target in step.targets)
        return self.parent(name)

    def parent(self, name: str) -> Parent:
        """A parent by its name; only the last one asked for stays in memory."""
        if self._parent is None or self._parent.name != name:
            self._parent = Parent(self, name)
        return self._parent

    @property
    def notes(self) -> list[str]:
        """Warnings of this run, kept in the manifest so that a resumed run still reports them."""
        return self.folder.notes

    @staticmethod
    def member_name(target: float) -> str:
        return f"{target:g}x"

    @property
    def names(self) -> list[str]:
        """The dense model first, then the members by target."""
        return [DENSE, *map(self.member_name, self.recipe.speedups)]

    @functools.cached_property
    def engine_versions(self) -> dict[EngineName, str]:
        """Of the engine that serves, and of the baseline's; asking takes a process where it has its own environment."""
        names = (self.recipe.environment.engine, self.recipe.baseline_engine)
        return {name: get_engine(name).version() for name in dict.fromkeys(names)}

    @property
    def model_settings(self) -> dict[str, Any]:
        """Model section without where the model lies: its content has a hash of its own."""
        return self.recipe.model.model_dump(exclude={"path", "revision"})

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        if not self.recipe.dense.train:
            return load_dense(self.recipe.model)
        if self.folder.is_current("train dense", self.dense_key()) and self.folder.dense_checkpoint.is_dir():
            trained = self.recipe.model.model_copy(update={"path": str(self.folder.dense_checkpoint), "revision": None})
            return load_dense(trained)
        with torch.random.fork_rng():  # a new head starts from the recipe's seed
            torch.manual_seed(self.recipe.seed)
            return load_dense(self.recipe.model, self.task.head_settings(self.raw_train_rows))

    def dense_key(self) -> str:
        """Everything that a dense model trained by this run depends on."""
        recipe = self.recipe
        return content_key(
            base=self.base_hash,
            data=self.train_hash,
            columns=self.train_columns,
            dense=recipe.dense.model_dump(exclude={"save_steps", "report_to"}),
            task=self.model_settings,
            seq_len=recipe.environment.workload.seq_len,
            seed=recipe.seed,
        )

    @property
    def model_hash(self) -> str:
        """Stands for the dense model's weights."""
        return self.dense_key() if self.recipe.dense.train else self.base_hash

    @property
    def teacher_hash(self) -> str:
        teacher = self.recipe.recover.teacher
        return self.model_hash if teacher is None else source_hash(resolve_model_path(teacher))

    @property
    def calibration_key(self) -> str:
        """Stands for the calibration examples as the model sees them."""
        recipe, names = self.recipe, {"config_name", "text_columns", "label_column", "n_calibration"}
        return content_key(
            data=self.calibration_hash,
            columns=recipe.data.model_dump(include={"calibration_split", *names}),
            task=self.model_settings,
            seq_len=recipe.environment.workload.seq_len,
            seed=recipe.seed,
        )

    @property
    def evaluation_key(self) -> str:
        """Stands for the evaluation examples."""
        recipe, names = self.recipe, {"evaluation_split", "config_name", "text_columns", "label_column", "n_evaluation"}
        return content_key(
            data=self.evaluation_hash,
            columns=recipe.data.model_dump(include=names),
            model=self.model_settings,
            seed=recipe.seed,
            seq_len=recipe.environment.workload.seq_len,
        )

    @property
    def train_columns(self) -> dict[str, Any]:
        """Settings that decide which training examples there are."""
        data = self.recipe.data
        names = {"config_name", "text_columns", "label_column", "n_train"}
        return {"split": self.task.source(data, "train")[1], **data.model_dump(include=names)}

    @property
    def dense(self) -> nn.Module:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        """Tokenizer or image processor."""
        return self._loaded[1]

    @functools.cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.dense.config)  # type: ignore[arg-type]

    @functools.cached_property
    def table(self) -> LatencyTable:
        return LatencyTable.load(self.folder.profile)

    @functools.cached_property
    def calibration_rows(self) -> list[dict[str, Any]]:
        return self.task.load_rows(self.recipe.data, "calibration", self.recipe.seed)

    @functools.cached_property
    def evaluation_rows(self) -> list[dict[str, Any]]:
        rows = self.task.load_rows(self.recipe.data, "evaluation", self.recipe.seed)
        return self.task.check_labels(rows, self.dense.config)

    @functools.cached_property
    def raw_train_rows(self) -> list[dict[str, Any]]:
        """Training rows with labels as the data have them."""
        return self.task.load_rows(self.recipe.data, "train", self.recipe.seed)

    @functools.cached_property
    def train_rows(self) -> list[dict[str, Any]]:
        """Training rows, with labels in the model's numbering where a loss reads them."""
        if self.recipe.dense.train or self.recipe.recover.task_weight:
            return self.task.check_labels(self.raw_train_rows, self.dense.config)
        return self.task.unlabelled(self.raw_train_rows)

    def check_data(self) -> None:
        """Read all data sets before any long work, so that bad data ends the run in its first second."""
        self.task.check_labels([], self.dense.config)  # refuses heads that the task cannot compare
        if not self.folder.database(DENSE).exists():
            self.calibration_rows  # noqa: B018
        if self.recipe.data.evaluation is not None:
            self.evaluation_rows  # noqa: B018
        if self.trains or self.recipe.dense.train or self.recipe.compress.trains:
            from ziplm_deploy.stages.training_checks import check_training

            check_training(self)

    def encode(
        self, rows: list[dict[str, Any]], batch_size: int = BATCH_SIZE, pad_to: int | None = None
    ) -> list[Batch]:
        """Model inputs; what the tokenizer gives and the model does not take is left out."""
        accepted = inspect.signature(self.dense.forward).parameters
        seq_len = self.recipe.environment.workload.seq_len
        batches = self.task.encode(EvaluationSet(rows, self.processor, seq_len, batch_size, pad_to))
        return [{name: value for name, value in batch.items() if name in accepted} for batch in batches]

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Calibration examples for Hessians, search and re-ranking; the latter two are parts of the first."""
        rows, search = self.calibration_rows, self.recipe.prune.search
        return Calibration(
            hessian=self.encode(rows),
            search=self.encode(rows[: search.n_sequences]),
            rerank=self.encode(rows[-search.n_rerank :]),
        )

    @property
    def ranges_rows(self) -> list[dict[str, Any]]:
        """Calibration rows for INT8."""
        return self.calibration_rows[: self.recipe.compress.int8.n_calibration]

    @functools.cached_property
    def ranges_batches(self) -> list[Batch]:
        """Calibration examples for INT8, of the shape that the ONNX files take.

        With static shapes every batch is whole; where there are fewer examples than that, they are repeated.
        """
        recipe, rows = self.recipe, self.ranges_rows
        if recipe.export.shapes == "dynamic":
            return self.encode(rows)
        size = recipe.environment.workload.batch_size
        # Encoding sorts by length and drops repeated texts: cut before it, look at what came out after it.
        batches = self.encode(rows[: len(rows) // size * size] or rows, size, recipe.environment.workload.seq_len)
        return [batch for batch in batches if _count(batch) == size] or [_filled_up(batches[0], size)]

    def count_tokens(self) -> int:
        """Tokens that count; an image gives one for each of its patches."""
        batches = self.calibration.hessian
        if "attention_mask" in batches[0]:
            return sum(int(batch["attention_mask"].sum()) for batch in batches)
        config = self.dense.config
        patches: int = (config.image_size // config.patch_size) ** 2 + 1  # type: ignore[union-attr, operator, assignment]
        return sum(len(batch["pixel_values"]) for batch in batches) * patches

    @functools.cached_property
    def examples(self) -> Examples:
        """Training examples, encoded once for all members."""
        from ziplm_deploy.recovery.examples import Examples

        rows = self.task.examples(self.train_rows, self.processor, self.recipe.environment.workload.seq_len)
        return Examples(rows, self.task, self.processor)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher with what it has answered already, one for all members."""
        from ziplm_deploy.recovery.teacher import make_teacher
        from ziplm_deploy.stages.training_checks import load_teacher

        return make_teacher(load_teacher(self), self.task, self.examples, self.recipe.recover)

    def file_hash(self, path: Path) -> str:
        """Hash of an output of an earlier stage.

        Raises:
            CorruptArtifactError: it is missing.
        """
        if not path.is_file():
            raise CorruptArtifactError(f"expected {path} from an earlier stage, found none; run all stages again")
        return file_hash(path)


def _count(batch: Batch) -> int:
    """Examples in a batch."""
    return len(next(iter(batch.values())))


def _filled_up(batch: Batch, size: int) -> Batch:
    """A batch of ``size`` examples: those of ``batch``, again and again."""
    rows = torch.arange(size) % _count(batch)
    return {name: value[rows] for name, value in batch.items()}
