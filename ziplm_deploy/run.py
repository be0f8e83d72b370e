"""The state of one run: recipe, folder, and what several stages need, made once and when it is first asked for."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ziplm_deploy.architectures import model_shape, prunable_modules
from ziplm_deploy.artifacts import LatencyTable, ModelShape
from ziplm_deploy.calibration import iter_statistics
from ziplm_deploy.checkpoints import load_dense
from ziplm_deploy.config import Recipe
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.machine import machine_info, usable_cores
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.database import Database, build_database, estimate_bytes
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.run_folder import RunFolder, content_key, file_hash, source_hash
from ziplm_deploy.sources import resolve_model_path
from ziplm_deploy.tasks import Task, get_task

DENSE = "dense"
STAGES = ("profile", "calibrate", "prune", "export", "benchmark", "evaluate", "report")
Batch = dict[str, Tensor]
BATCH_SIZE = 32


class Run:
    """What the stages share. Attributes are computed on first use, so a resumed run loads only what it needs."""

    def __init__(self, recipe: Recipe, progress: Progress | None = None) -> None:
        torch.set_num_threads(usable_cores())
        self.recipe = recipe
        self.progress = progress or Progress()
        self.folder = RunFolder(recipe)
        self.task: Task = get_task(recipe.model)
        revision = f"@{recipe.model.revision}" if recipe.model.revision else ""
        self.model_hash = source_hash(resolve_model_path(recipe.model.path)) + revision
        self.calibration_hash = source_hash(recipe.data.calibration)
        self.evaluation_hash = source_hash(recipe.data.evaluation)
        self.folder.record(
            model_hash=self.model_hash,
            calibration_hash=self.calibration_hash,
            evaluation_hash=self.evaluation_hash,
            machine=machine_info().model_dump(mode="json"),
        )

    def begin(self, stage: str, what: str) -> None:
        self.progress.stage(f"{stage}: {what}", STAGES.index(stage) + 1, len(STAGES))

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

    @property
    def model_settings(self) -> dict[str, Any]:
        """Model section without where the model lies: its content has a hash of its own."""
        return self.recipe.model.model_dump(exclude={"path", "revision"})

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        return load_dense(self.recipe.model)

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

    def check_data(self) -> None:
        """Read both data sets before any long work, so that bad data ends the run in its first second."""
        self.task.check_labels([], self.dense.config)  # refuses heads that the task cannot compare
        if not self.folder.database.exists():
            self.calibration_rows  # noqa: B018
        if self.recipe.data.evaluation is not None:
            self.evaluation_rows  # noqa: B018

    def encode(self, rows: list[dict[str, Any]]) -> list[Batch]:
        """Model inputs; what the tokenizer gives and the model does not take is left out."""
        accepted = inspect.signature(self.dense.forward).parameters
        batches = self.task.encode(rows, self.processor, self.recipe.environment.seq_len, BATCH_SIZE)
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

    def database_key(self) -> str:
        recipe = self.recipe
        return content_key(
            model=self.model_hash,
            data=self.calibration_hash,
            columns=recipe.data.model_dump(exclude={"calibration", "evaluation", "evaluation_split", "n_evaluation"}),
            task=self.model_settings,
            seq_len=recipe.environment.seq_len,
            seed=recipe.seed,
            prune=recipe.prune.model_dump(include={"method", "damping", "centred"}),
            sizes=database_sizes(self.dense, self.table),
        )

    def build_database(self) -> None:
        """Collect statistics in one pass and write the database; notes when there are fewer tokens than wanted."""
        recipe = self.recipe
        modules = prunable_modules(self.dense)
        sizes = database_sizes(self.dense, self.table)
        needed = estimate_bytes(modules, sizes, self.shape.hidden_size)
        limit = f"Hessians at most {recipe.prune.memory_limit_gb:g} GiB at a time"
        self.progress.note(f"needs up to {needed / 2**30:.2f} GiB beside the model, {limit}")
        n_tokens = self._count_tokens()
        wanted = 4 * self.shape.intermediate_size
        text = f"calibration has {n_tokens} tokens, {wanted} (4 x the FFN width) are wanted: more data may prune better"
        self.folder.set_note("calibration tokens", text if n_tokens < wanted else None)
        if n_tokens < wanted:
            self.progress.note(text)
        statistics = iter_statistics(
            self.dense,
            self.calibration.hessian,
            modules,
            memory_limit_bytes=int(recipe.prune.memory_limit_gb * 2**30),
        )
        database = build_database(
            self.dense, statistics, sizes, recipe.prune, seed=recipe.seed, progress=self.progress.step
        )
        database.save(self.folder.database)

    def _count_tokens(self) -> int:
        """Tokens that count; an image gives one for each of its patches."""
        batches = self.calibration.hessian
        if "attention_mask" in batches[0]:
            return sum(int(batch["attention_mask"].sum()) for batch in batches)
        config = self.dense.config
        patches: int = (config.image_size // config.patch_size) ** 2 + 1  # type: ignore[union-attr, operator, assignment]
        return sum(len(batch["pixel_values"]) for batch in batches) * patches

    @functools.cached_property
    def planner(self) -> Planner:
        return Planner(
            self.dense,
            self.task,
            self.table,
            Database.load(self.folder.database),
            self.calibration,
            self.recipe.prune,
            self.recipe.seed,
        )

    @property
    def onnx_files(self) -> dict[str, Path]:
        return {name: self.folder.member(name) / "model.onnx" for name in self.names}

    def file_hash(self, path: Path) -> str:
        """Hash of an output of an earlier stage.

        Raises:
            CorruptArtifactError: it is missing.
        """
        if not path.is_file():
            raise CorruptArtifactError(f"expected {path} from an earlier stage, found none; run all stages again")
        return file_hash(path)
