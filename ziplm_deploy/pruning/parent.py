"""A model that members are pruned from, the dense one or a trained member: Hessians, database of levels, planner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.modules import PrunableModule, prunable_modules
from ziplm_deploy.models.resizing import kept_structures
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.calibration import iter_statistics
from ziplm_deploy.pruning.database import Database, estimate_bytes, iter_levels, levels_bytes, save_levels
from ziplm_deploy.pruning.fisher import fisher_information
from ziplm_deploy.pruning.methods import get_method
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.tasks import Task


class Parent:
    """One parent of a run. Model, table and calibration data come from functions: they are asked for when needed."""

    def __init__(
        self,
        name: str,
        database_path: Path,
        *,
        load: Callable[[], nn.Module],
        table: Callable[[], LatencyTable],
        calibration: Callable[[], Calibration],
        task: Task,
        recipe: Recipe,
    ) -> None:
        self.name, self.database_path = name, database_path
        self._load, self._table, self._calibration = load, table, calibration
        self._task, self._recipe = task, recipe

    @functools.cached_property
    def model(self) -> nn.Module:
        return self._load()

    @functools.cached_property
    def sizes(self) -> dict[str, list[int]]:
        """Levels to compute for every module."""
        return database_sizes(self.model, self._table())

    def build_database(self, progress: Progress, hessians_of: nn.Module | None = None) -> None:
        """Collect statistics in one pass and write the database.

        ``hessians_of``: the dense model, where a gradual run does not collect them anew from its trained members.
        """
        prune = self._recipe.prune
        modules = prunable_modules(self.model)
        hidden_size = int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        method = get_method(prune.method)
        sizes = {each.name: method.level_sizes(self.sizes[each.name], each.structures) for each in modules}
        at_once = int(prune.memory_limit_gb * 2**30)
        needed = estimate_bytes(modules, sizes, hidden_size, memory_limit_bytes=at_once, fisher=prune.fisher)
        limit = f"Hessians at most {prune.memory_limit_gb:g} GiB at a time"
        on_disk = sum(levels_bytes(module, sizes[module.name], hidden_size) for module in modules)
        progress.note(
            f"needs up to {needed / 2**30:.2f} GiB beside the model, {limit}, and {on_disk / 2**30:.2f} GiB on the disk"
        )
        fisher = self._fisher(hessians_of, progress) if prune.fisher else None
        moments = self._moments(modules, hessians_of)
        built = iter_levels(
            self.model, moments, self.sizes, prune, seed=self._recipe.seed, fisher=fisher, progress=progress.step
        )
        save_levels(self.database_path, built, sizes)

    def _fisher(self, hessians_of: nn.Module | None, progress: Progress) -> dict[str, Tensor]:
        """Fisher information at every module's output, of the model that statistics are of."""
        model = self.model if hessians_of is None else hessians_of
        return fisher_information(
            model,
            self._task,
            self._calibration().hessian,
            prunable_modules(model),
            seed=self._recipe.seed,
            memory_limit_bytes=self._limit_bytes,
            progress=progress.step,
        )

    @property
    def _limit_bytes(self) -> int:
        return int(self._recipe.prune.memory_limit_gb * 2**30)

    def _moments(
        self, modules: list[PrunableModule], hessians_of: nn.Module | None
    ) -> Iterator[tuple[str, InputMoments]]:
        batches, limit = self._calibration().hessian, self._limit_bytes
        if hessians_of is None:
            yield from iter_statistics(self.model, batches, modules, memory_limit_bytes=limit)
            return
        kept = kept_structures(self.model)
        left = {module.name for module in modules if module.structures}
        of_dense = [module for module in prunable_modules(hessians_of) if module.name in left]
        groups = {module.name: module.group_size for module in of_dense}
        for name, moments in iter_statistics(hessians_of, batches, of_dense, memory_limit_bytes=limit):
            yield name, moments.restricted(kept[name], groups[name])

    @functools.cached_property
    def planner(self) -> Planner:
        """Planner of all members pruned from this parent; its database must be on the disk."""
        database = Database.load(self.database_path)
        recipe = self._recipe
        return Planner(self.model, self._task, self._table(), database, self._calibration(), recipe.prune, recipe.seed)
