"""A model that members are pruned from, the dense one or a trained member: Hessians, database of levels, planner."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import nn

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.models.member_files import load
from ziplm_deploy.models.modules import PrunableModule, prunable_modules
from ziplm_deploy.models.resizing import kept_structures
from ziplm_deploy.pruning.calibration import iter_statistics
from ziplm_deploy.pruning.database import Database, build_database, estimate_bytes
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.planner import Planner, database_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ziplm_deploy.run.run import Run


DENSE = "dense"


class Parent:
    """One parent of a run. Everything is computed on first use, so a resumed run loads only what it needs."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.database_path = run.folder.database(name)

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.run.dense if self.name == DENSE else load(self.run.folder.member(self.name))

    @functools.cached_property
    def sizes(self) -> dict[str, list[int]]:
        """Levels to compute for every module."""
        return database_sizes(self.model, self.run.table)

    def key(self) -> str:
        """Everything that the database depends on."""
        run, recipe = self.run, self.run.recipe
        weights = run.folder.member(self.name) / "pruned.safetensors"
        return content_key(
            model=run.model_hash,
            parent=None if self.name == DENSE else run.file_hash(weights),
            calibration=run.calibration_key,
            prune=recipe.prune.model_dump(include={"method", "damping", "centred"}),
            hessians="own" if recipe.recover.rebuild_hessians or self.name == DENSE else "dense",
            sizes=self.sizes,
        )

    def build_database(self) -> None:
        """Collect statistics in one pass and write the database; notes when there are fewer tokens than wanted."""
        run, recipe = self.run, self.run.recipe
        modules = prunable_modules(self.model)
        needed = estimate_bytes(modules, self.sizes, run.shape.hidden_size)
        limit = f"Hessians at most {recipe.prune.memory_limit_gb:g} GiB at a time"
        run.progress.note(f"needs up to {needed / 2**30:.2f} GiB beside the model, {limit}")
        self._note_few_tokens()
        database = build_database(
            self.model,
            self._statistics(modules),
            self.sizes,
            recipe.prune,
            seed=recipe.seed,
            progress=run.progress.step,
        )
        database.save(self.database_path)

    def _statistics(self, modules: list[PrunableModule]) -> Iterator[tuple[str, InputMoments]]:
        recipe, batches = self.run.recipe, self.run.calibration.hessian
        limit = int(recipe.prune.memory_limit_gb * 2**30)
        if self.name == DENSE or recipe.recover.rebuild_hessians:
            yield from iter_statistics(self.model, batches, modules, memory_limit_bytes=limit)
            return
        dense, kept = self.run.dense, kept_structures(self.model)
        left = {module.name for module in modules if module.structures}
        of_dense = [module for module in prunable_modules(dense) if module.name in left]
        groups = {module.name: module.group_size for module in of_dense}
        for name, statistics in iter_statistics(dense, batches, of_dense, memory_limit_bytes=limit):
            yield name, statistics.restricted(kept[name], groups[name])

    def _note_few_tokens(self) -> None:
        run = self.run
        n_tokens, wanted = run.count_tokens(), 4 * run.shape.intermediate_size
        text = f"calibration has {n_tokens} tokens, {wanted} (4 x the FFN width) are wanted: more data may prune better"
        run.folder.set_note("calibration tokens", text if n_tokens < wanted else None)
        if n_tokens < wanted:
            run.progress.note(text)

    @functools.cached_property
    def planner(self) -> Planner:
        run = self.run
        return Planner(
            self.model,
            run.task,
            run.table,
            Database.load(self.database_path),
            run.calibration,
            run.recipe.prune,
            run.recipe.seed,
        )
