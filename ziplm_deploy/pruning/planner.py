"""From a latency table and a database to a pruned model for one target: budget, seeds, search, re-ranking, refit.

The table's dense latency is the reference of all speedups; its base and cells are what members will cost, perhaps as
INT8 on another engine. So nothing here takes the dense latency for a sum of cells: a compressed model may reach a
target with every module whole, and then its plan keeps everything.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import numpy as np
from torch import nn

from ziplm_deploy.errors import IncompatibleArtifactError, TargetUnreachableError
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.levels import LevelWeights, pareto_levels
from ziplm_deploy.models.modules import PrunableModule, prunable_modules
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.models.shape import MODULE_KINDS, ModuleId, ModuleKind
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.allocations import uniform_plan
from ziplm_deploy.pruning.database import Database, level_for
from ziplm_deploy.pruning.in_order import LevelOf, exchanged_fraction, prune_in_order
from ziplm_deploy.pruning.kernels import spdy
from ziplm_deploy.pruning.layer_calls import that_fit
from ziplm_deploy.pruning.methods import get_method
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.pruning.reconstruction import reconstruct
from ziplm_deploy.pruning.search.search import PlanSearch, measure_sensitivities
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.pruning.search.stitching import PlanLoss, StitchedModel
from ziplm_deploy.pruning.search.surrogate import Surrogate
from ziplm_deploy.recipe import PruneConfig, SearchConfig
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch

CACHE_BYTES = 512 * 2**20
RERANKED = 5
WARM_SHARE = 4  # a search that starts from a plan for almost the same budget tries a quarter of the plans


def table_sizes(table: LatencyTable) -> dict[ModuleKind, list[int]]:
    """Sizes worth having, descending: those of the table that are faster than every larger one."""
    result = {}
    for kind in MODULE_KINDS:
        sizes = sorted(table.sizes(kind), reverse=True)
        result[kind] = pareto_levels(sizes, {size: table.latency_ms(kind, size) for size in sizes})
    return result


def check_target(table: LatencyTable, speedup_target: float) -> None:
    """Raise :class:`TargetUnreachableError`, naming the largest speedup, if the table rules the target out."""
    largest = table.largest_speedup()
    if speedup_target > largest:
        raise TargetUnreachableError(
            f"expected a speedup that some plan can reach, found {speedup_target:g}x; with every layer dropped this "
            f"model reaches {largest:.2f}x as {table.variant} in {table.environment.describe()}: ask for less",
            largest,
        )


def search_space(table: LatencyTable, database: Database) -> SearchSpace:
    """Levels that stand in the database, with the table's milliseconds and the database's relative errors."""
    modules = tuple(database.modules)
    sizes = tuple(tuple(sorted(database.modules[name], reverse=True)) for name in modules)
    kinds = [ModuleId.parse(name).kind for name in modules]
    latency = tuple(
        np.array([table.latency_ms(kind, size) for size in levels]) for kind, levels in zip(kinds, sizes, strict=True)
    )
    errors = tuple(
        np.maximum.accumulate([database.modules[name][size].relative_error for size in levels])
        for name, levels in zip(modules, sizes, strict=True)
    )
    return SearchSpace(modules, sizes, latency, errors)


@dataclass(frozen=True)
class Calibration:
    """Encoded examples for the three uses of calibration data."""

    hessian: list[Batch]
    search: list[Batch]
    rerank: list[Batch]


class Planner:
    """Solves targets one after the other from the same table, database and measured sensitivities.

    ``model`` is dense, or already resized: then no plan grows a module. Budgets and speedups are over the table's dense
    model either way; losses are over ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        table: LatencyTable,
        database: Database,
        calibration: Calibration,
        prune: PruneConfig,
        seed: int,
    ) -> None:
        self.model, self.task, self.table, self.database = model, task, table, database
        self.calibration, self.prune, self.seed = calibration, prune, seed
        self.space = search_space(table, database)
        self._whole: Plan = (0,) * len(self.space.modules)  # every module as it is now
        self._curves: list[spdy.Array] | None = None
        self._losses: tuple[PlanLoss, PlanLoss] | None = None

    def plan(
        self,
        target: float,
        predicted_target: float | None = None,
        warm: dict[str, int] | None = None,
        progress: StepProgress | None = None,
    ) -> PruningPlan:
        """The plan for ``target``; ``predicted_target`` is what the table must predict for it (closed loop).

        ``warm``: sizes of an earlier plan for almost this budget, around which the search then tries fewer plans;
        ``progress``: called with (plans tried, plans to try).

        Raises:
            TargetUnreachableError: no plan fits; names the largest predicted speedup.
        """
        budget_ms = self.budget_ms(predicted_target or target)
        loss: float | None = None
        seeds: dict[str, float] = {}
        evaluations = 0
        if self.space.plan_ms(self._whole) <= budget_ms:  # no plan loses less than the one that keeps everything
            chosen = self.space.as_sizes(self._whole)
        elif get_method(self.prune.method).searches:
            chosen, loss, seeds, evaluations = self._search(budget_ms, warm, progress)
        else:
            chosen, evaluations = self._baseline(budget_ms, progress)
        found = self._plan_of(chosen, target, budget_ms)
        return found.model_copy(update={"search_loss": loss, "seed_losses": seeds, "evaluations": evaluations})

    def _plan_of(self, sizes: dict[str, int], target: float, budget_ms: float) -> PruningPlan:
        predicted_ms = self.table.predict_ms(sizes)
        return PruningPlan(
            speedup_target=target,
            budget_ms=budget_ms,
            method=self.prune.method,
            sizes=sizes,
            predicted_ms=predicted_ms,
            predicted_speedup=self.table.dense.median_ms / predicted_ms,
        )

    def draft(self, target: float, predicted_target: float, progress: StepProgress | None = None) -> PruningPlan:
        """A plan from measured sensitivities alone: about as fast as the one that a search would find.

        Raises:
            TargetUnreachableError: no plan fits; names the largest predicted speedup.
        """
        budget_ms = self.budget_ms(predicted_target)
        if self.space.plan_ms(self._whole) <= budget_ms:
            return self._plan_of(self.space.as_sizes(self._whole), target, budget_ms)
        curves = self.sensitivities(progress)
        search = PlanSearch(self.space, self.losses()[0], budget_ms, self.seed)
        sizes = self.space.as_sizes(search.grow(search.solve(curves), Surrogate(curves)))
        return self._plan_of(sizes, target, budget_ms)

    def with_prune_settings(self, prune: PruneConfig) -> Planner:
        """A copy of this planner with other prune settings. Table, database and measured sensitivities are shared."""
        other = copy.copy(self)
        other.prune = prune
        return other

    def budget_ms(self, predicted_target: float) -> float:
        """Milliseconds for all modules: what the dense reference allows, less the base in the members' form.

        Raises:
            TargetUnreachableError: no plan of this space fits.
        """
        largest = self._largest_speedup()
        if predicted_target > largest:
            raise TargetUnreachableError(
                f"expected a plan that is predicted {predicted_target:.3g}x faster, found that the fastest one "
                f"reaches {largest:.2f}x; ask for less",
                largest,
            )
        return self.table.modules_budget_ms(predicted_target)

    def _largest_speedup(self) -> float:
        return self.table.predict_speedup(self.space.plan_ms(self.space.fastest()))

    def changes(self, plan: PruningPlan, predicted_target: float) -> bool:
        """Whether a budget for ``predicted_target`` forces, or lets, a plan become another one."""
        slack = self.budget_ms(predicted_target) - self.space.plan_ms(self.space.from_sizes(plan.sizes))
        growths = [
            latency[level - 1] - latency[level]
            for latency, level in zip(self.space.latency_ms, self.space.from_sizes(plan.sizes), strict=True)
            if level > 0
        ]
        return slack < 0 or any(extra <= slack for extra in growths)

    def resized(self, sizes: dict[str, int]) -> nn.Module:
        """The physically smaller model of a plan's sizes, not refitted."""
        return resize(self.model, {name: self.database.modules[name][size] for name, size in sizes.items()})

    def build(self, plan: PruningPlan, progress: StepProgress | None = None) -> tuple[nn.Module, list[str]]:
        """The physically smaller model of a plan, refitted if the recipe says so; and modules that could not be.

        Structures and weights are those of the database, or are decided anew in order, see :attr:`decides_in_order`.
        """
        refits = self.prune.reconstruct and get_method(self.prune.method).refits
        batches = that_fit(self.calibration.hessian, self.model)
        if plan.sizes == self.space.as_sizes(self._whole):
            return self.resized(plan.sizes), []
        if self.decides_in_order:
            return prune_in_order(
                self.model, plan.sizes, batches, self._level_of(plan.sizes), refits=refits, progress=progress
            )
        model = self.resized(plan.sizes)
        return model, reconstruct(self.model, model, batches, progress) if refits else []

    @property
    def decides_in_order(self) -> bool:
        """Whether modules of a plan are decided one after the other, each on what the pruned ones before it give."""
        return self.prune.in_order or get_method(self.prune.method).in_order

    def exchanged_fraction(self, plan: PruningPlan, built: nn.Module) -> float | None:
        """Fraction of the structures kept in shrunk modules that the database would not keep; None: not in order."""
        if not self.decides_in_order:
            return None
        levels = {name: self.database.modules[name][size] for name, size in plan.sizes.items()}
        return exchanged_fraction(self.model, built, levels)

    def _level_of(self, sizes: dict[str, int]) -> LevelOf:
        def level_of(module: PrunableModule, moments: InputMoments) -> LevelWeights:
            return level_for(
                self.model,
                module,
                moments,
                sizes[module.name],
                self.prune,
                seed=self.seed,
                fisher=self.database.fisher.get(module.name),
            )

        return level_of

    def losses(self) -> tuple[PlanLoss, PlanLoss]:
        """Loss on the search examples and on the re-ranking examples, sharing one stitched model."""
        if self._losses is None:
            stitched = StitchedModel(self.model, self.task, self.database, self.space, CACHE_BYTES)
            search = PlanLoss(stitched, self.calibration.search)
            self._losses = search, PlanLoss(stitched, self.calibration.rerank, first_index=len(self.calibration.search))
        return self._losses

    def sensitivities(self, progress: StepProgress | None = None) -> list[spdy.Array]:
        """Loss of every module alone at every level, measured once for all targets; L × [S_l].

        With no levels to measure: to second order, from the Fisher information.
        """
        if self._curves is None and not self.prune.search.sensitivity_levels:
            per_error = [self.database.losses.get(name, 0.0) for name in self.space.modules]  # dropped before: 0
            self._curves = [loss * errors for loss, errors in zip(per_error, self.space.errors, strict=True)]
        elif self._curves is None:
            n_levels = self.prune.search.sensitivity_levels
            self._curves = measure_sensitivities(self.space, self.losses()[0], n_levels, progress)
        return self._curves

    def _search(
        self, budget_ms: float, warm: dict[str, int] | None, progress: StepProgress | None
    ) -> tuple[dict[str, int], float, dict[str, float], int]:
        """Sizes, re-ranked loss, re-ranked losses of the seeds, evaluations."""
        search_loss, rerank_loss = self.losses()
        curves = self.sensitivities(progress)
        search = PlanSearch(self.space, search_loss, budget_ms, self.seed)
        seeds = self._seeds(search, curves)
        if warm is not None and search.fits(self.space.from_sizes(warm)):
            seeds["previous"] = self.space.from_sizes(warm)
        config = self.prune.search if warm is None else _warm(self.prune.search)
        result = search.run(seeds, curves, config, progress)
        scores: dict[Plan, float] = {}
        for plan in dict.fromkeys([*result.plans[:RERANKED], *seeds.values()]):
            scores[plan] = rerank_loss(plan)
        winner = min(scores, key=scores.__getitem__)
        seed_losses = {name: scores[plan] for name, plan in seeds.items()}
        return self.space.as_sizes(winner), scores[winner], seed_losses, result.evaluations

    def _seeds(self, search: PlanSearch, curves: list[spdy.Array]) -> dict[str, Plan]:
        seeds = {"relative error": search.solve(self.space.errors), "measured": search.solve(curves)}
        with contextlib.suppress(spdy.InfeasibleBudgetError):  # only uneven plans may be fast enough
            seeds["uniform"] = uniform_plan(self.space, search.budget_ms)
        return seeds

    def _baseline(self, budget_ms: float, progress: StepProgress | None) -> tuple[dict[str, int], int]:
        """Sizes, and how many plans were measured for them."""
        method, evaluations = get_method(self.prune.method), 0

        def loss(plan: Plan, above: float) -> float:
            nonlocal evaluations
            evaluations += 1
            if progress is not None:
                progress(evaluations, len(plan) * (len(plan) + 1) // 2)  # so many if every block is dropped
            return self.losses()[0](plan, above)

        try:
            if method.measures:
                plan = method.measured_plan(self.space, budget_ms, loss)
            else:
                plan = method.plan(self.space, budget_ms, self.database.scores, self.seed)
        except spdy.InfeasibleBudgetError as error:
            raise TargetUnreachableError(str(error), self._largest_speedup()) from error
        return self.space.as_sizes(plan), evaluations


def _warm(config: SearchConfig) -> SearchConfig:
    """Effort of a search that starts from a plan which a whole search has found for nearly the same budget."""
    fewer = {name: -(-getattr(config, name) // WARM_SHARE) for name in ("coefficient_steps", "swap_evaluations")}
    return config.model_copy(update=fewer)


def database_sizes(model: nn.Module, table: LatencyTable) -> dict[str, list[int]]:
    """Levels to compute for every module, descending: the size it has now, and the table's useful ones below it.

    Raises:
        IncompatibleArtifactError: the table has no cell for a size that the model has now.
    """
    useful = table_sizes(table)
    sizes: dict[str, list[int]] = {}
    for module in prunable_modules(model):
        now = module.structures
        if now not in table.sizes(module.kind):
            raise IncompatibleArtifactError(
                f"expected a latency table with a cell for every size of this model, found none for {module.name} at "
                f"{now}; use the table that it was pruned with"
            )
        # a size that is not useful itself is as slow as a larger useful one: every useful size below is faster
        sizes[module.name] = [now, *(size for size in useful[module.kind] if size < now)]
    return sizes
