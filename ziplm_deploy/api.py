"""The stages as functions of a recipe, for scripts and notebooks; the command line calls the same.

Each does what it needs of the stages before it; what a run folder already holds is not done again.
"""

from __future__ import annotations

import os
from pathlib import Path

from ziplm_deploy import pipeline
from ziplm_deploy.errors import CorruptArtifactError, RecipeError, UsageError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.stages import evaluate, formats
from ziplm_deploy.stages import profile as profiling
from ziplm_deploy.stages import report as reporting
from ziplm_deploy.stages.benchmark import is_benchmarked
from ziplm_deploy.stages.data_notes import note_other_evaluation
from ziplm_deploy.stages.export import export_generation
from ziplm_deploy.stages.profile import check_taken_table
from ziplm_deploy.stages.quantize import check_differences


def run_recipe(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """All stages: from a checkpoint to a family of measured ONNX models and its report.

    Raises:
        ZipLMError: see :mod:`ziplm_deploy.errors`. A missed target is no error: see ``verdict`` of the members.
    """
    return pipeline.run_pipeline(recipe, progress)


def profile(recipe: Recipe, progress: Progress | None = None) -> LatencyTable:
    """Measured milliseconds of every sub-block shape of the recipe's model, also in ``profile.json`` of the run."""
    with pipeline.begin(recipe, progress) as run:
        return profiling.STAGE(run)


def prune(recipe: Recipe, progress: Progress | None = None) -> dict[str, PruningPlan]:
    """Plan of every member by its name; torch models are in ``NAME/``, or ``pruning/NAME/`` if trained later.

    Raises:
        UsageError: ``recover.mode`` is ``gradual``: there each member is pruned from a trained one.
    """
    if recipe.recover.mode == "gradual":
        raise UsageError(
            "expected recover.mode none or one-shot for pruning alone, found gradual, where each target is pruned from "
            "the member trained before it; run: ziplm-deploy recover RECIPE"
        )
    with pipeline.begin(recipe, progress) as run:
        pipeline.pruned(run)
        return {member.name: PruningPlan.load(member.plan) for member in run.pruned_members}


def recover(recipe: Recipe, progress: Progress | None = None) -> dict[str, TrainingRecord]:
    """Members trained after pruning, by name, with what their training took; torch and ONNX are in their folders.

    Raises:
        RecipeError: ``recover.mode`` is ``none``.
    """
    if recipe.recover.mode == "none":
        raise RecipeError("expected recover.mode one-shot or gradual, found none; set it in the recipe")
    with pipeline.begin(recipe, progress) as run:
        pipeline.trained(run)
        return {member.name: TrainingRecord.load(member.training_record) for member in run.pruned_members}


def export(recipe: Recipe, progress: Progress | None = None) -> dict[str, Path]:
    """``model.onnx`` of the dense model and of every member, or ``model.gguf`` for llama.cpp, by name.

    Files for other runtimes that the recipe asks for (``export.gguf``, ``export.genai``) are written beside them.

    Without training they are as planned from the table, not yet measured; with it, measured before they were trained.
    """
    with pipeline.begin(recipe, progress) as run:
        if run.trains:
            pipeline.trained(run)
        else:
            pipeline.pruned(run)
            for generation in run.generations:
                export_generation(run, generation)
        formats.STAGE(run)
        return {member.name: member.as_exported.path for member in run.members}


def compress(recipe: Recipe, progress: Progress | None = None) -> dict[str, Path]:
    """Every file made from a member's ``model.onnx``, by names such as ``2x int8``.

    Raises:
        RecipeError: ``compress.variants`` is empty.
    """
    if not recipe.compress.variants:
        raise RecipeError("expected compress.variants in the recipe, found none; name int8, sparse or sparse-int8")
    with pipeline.begin(recipe, progress) as run:
        pipeline.build(run)
    files = [member.file(variant) for member in run.members for variant in recipe.compress.variants]
    return {file.label: file.path for file in files}


def benchmark(recipe: Recipe, progress: Progress | None = None, *, again: bool = False) -> BenchmarkRecord:
    """All members against the dense model; members that miss their target are solved again, as the recipe allows.

    ``again``: measure also what was measured before, say on a machine that was busy; the closed loop begins with its
    last plans, and has all its corrections again.
    """
    with pipeline.begin(recipe, progress) as run:
        if again:
            run.folder.forget_measurements()
        return pipeline.measured(run)


def report(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """Evaluate and report what was benchmarked before; measures no latency.

    Raises:
        CorruptArtifactError: the run has no benchmark yet.
    """
    path = recipe.run_dir / "benchmark.json"
    if not os.path.exists(path):
        raise CorruptArtifactError(
            f"expected a benchmarked run, found no {path}; run: ziplm-deploy benchmark RECIPE (or run RECIPE) first"
        )
    with pipeline.begin(recipe, progress) as run:
        if not is_benchmarked(run):
            raise CorruptArtifactError(
                f"expected a benchmark of the models and settings of this recipe in {path}, found one of others; run: "
                "ziplm-deploy run RECIPE"
            )
        check_taken_table(run)
        check_differences(run)
        note_other_evaluation(run)
        evaluate.STAGE(run)
        return reporting.STAGE(run)
