"""The stages as functions of a recipe, for scripts and notebooks; the command line calls the same.

Each does what it needs of the stages before it; what a run folder already holds is not done again.
"""

from __future__ import annotations

from pathlib import Path

from ziplm_deploy import pipeline
from ziplm_deploy.artifacts import BenchmarkRecord, FamilyReport, LatencyTable, PruningPlan
from ziplm_deploy.config import Recipe
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.progress import Progress
from ziplm_deploy.run import Run


def run_recipe(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """All stages: from a checkpoint to a family of measured ONNX models and its report.

    Raises:
        ZipLMError: see :mod:`ziplm_deploy.errors`. A missed target is no error: see ``verdict`` of the members.
    """
    return pipeline.run(recipe, progress)


def profile(recipe: Recipe, progress: Progress | None = None) -> LatencyTable:
    """Measured milliseconds of every sub-block shape of the recipe's model, also in ``profile.json`` of the run."""
    return pipeline.profile(Run(recipe, progress))


def prune(recipe: Recipe, progress: Progress | None = None) -> dict[str, PruningPlan]:
    """Plan of every member by its name; the smaller torch models are in the members' folders."""
    return _plans(_pruned(recipe, progress))


def export(recipe: Recipe, progress: Progress | None = None) -> dict[str, Path]:
    """``model.onnx`` of the dense model and of every member, by name, as planned from the table: not yet measured."""
    state = _pruned(recipe, progress)
    pipeline.export(state)
    return {name: state.folder.member(name) / "model.onnx" for name in state.names}


def benchmark(recipe: Recipe, progress: Progress | None = None) -> BenchmarkRecord:
    """All members against the dense model; members that miss their target are solved again, as the recipe allows."""
    state = _pruned(recipe, progress)
    pipeline.export(state)
    return pipeline.benchmark(state)


def report(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """Evaluate and report what was benchmarked before; measures no latency.

    Raises:
        CorruptArtifactError: the run has no benchmark yet.
    """
    path = recipe.run_dir / "benchmark.json"
    if not path.exists():
        raise CorruptArtifactError(
            f"expected a benchmarked run, found no {path}; run: ziplm-deploy benchmark RECIPE (or run RECIPE) first"
        )
    state = Run(recipe, progress)
    if not state.folder.is_current("benchmark", pipeline.benchmark_key(state)):
        raise CorruptArtifactError(
            f"expected a benchmark of the models and settings of this recipe in {path}, found one of others; run: "
            "ziplm-deploy run RECIPE"
        )
    pipeline.evaluate(state)
    return pipeline.report(state)


def _pruned(recipe: Recipe, progress: Progress | None) -> Run:
    state = Run(recipe, progress)
    pipeline.profile(state)
    pipeline.calibrate(state)
    pipeline.prune(state)
    return state


def _plans(state: Run) -> dict[str, PruningPlan]:
    return {name: PruningPlan.load(state.folder.plan(name)) for name in map(state.member_name, state.recipe.speedups)}
