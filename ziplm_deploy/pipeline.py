"""The stages in order, from a checkpoint to a family of measured ONNX models. Read this file first.

Every stage reads and writes files of the run folder and skips what was made before from the same inputs, so a killed
run goes on where it was. What a stage does stands in the file of its name in ``stages/``.
"""

from __future__ import annotations

from typing import Any

from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages import (
    baselines,
    benchmark,
    calibrate,
    closed_loop,
    compress,
    evaluate,
    export,
    formats,
    profile,
    prune,
    recover,
    report,
    sample_texts,
    settle,
    train_dense,
)
from ziplm_deploy.stages.stage import Stage

FIRST: tuple[Stage[Any], ...] = (profile.STAGE, sample_texts.STAGE, train_dense.STAGE)
PRUNING: tuple[Stage[Any], ...] = (calibrate.STAGE, settle.STAGE, prune.STAGE)
OF_A_GENERATION: tuple[Stage[Any], ...] = (*PRUNING, export.PRUNED, closed_loop.STAGE, recover.STAGE)
FILES: tuple[Stage[Any], ...] = (export.TRAINED, compress.STAGE, formats.STAGE, baselines.STAGE)
LAST: tuple[Stage[Any], ...] = (*FILES, benchmark.STAGE, evaluate.STAGE, report.STAGE)


def run_pipeline(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """All stages of a recipe.

    Raises:
        ZipLMError: see :mod:`ziplm_deploy.errors`; nothing half-written is left behind.
    """
    with begin(recipe, progress) as run:
        measured(run)
        evaluate.STAGE(run)
        return report.STAGE(run)


def begin(recipe: Recipe, progress: Progress | None = None) -> Run:
    """A run that knows how many stages it will announce."""
    run = Run(recipe, progress)
    once = sum(stage.shown(recipe) for stage in (*FIRST, *LAST))
    run.n_stages = once + len(run.generations) * sum(stage.shown(recipe) for stage in OF_A_GENERATION)
    return run


def measured(run: Run) -> BenchmarkRecord:
    """All files of all members, the targets reached if they can be."""
    build(run)
    baselines.STAGE(run)
    while closed_loop.compensate_float32(run, record := benchmark.STAGE(run)):
        build(run)
    return closed_loop.reported(run, record)


def build(run: Run) -> None:
    """Every member as it will serve: planned, fast enough, trained and compressed if the recipe says so."""
    trained(run)
    compress.STAGE(run)
    formats.STAGE(run)


def trained(run: Run) -> None:
    """Every member before compression, exported."""
    first(run)
    for generation in run.generations:  # one for all targets; one for each where a member is pruned from the one before
        for stage in OF_A_GENERATION:
            stage(run, generation)
    export.TRAINED(run)


def pruned(run: Run) -> None:
    """Plans and pruned torch models of every member, of which only drafts were measured."""
    first(run)
    for generation in run.generations:
        for stage in PRUNING:
            stage(run, generation)


def first(run: Run) -> None:
    """Table, texts of the dense model where they are asked for, and the dense model."""
    for stage in FIRST:
        stage(run)
