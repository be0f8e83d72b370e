"""What users get from the dense model without pruning: made here, timed and scored with the members."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ziplm_deploy.artifacts import atomic_folder, content_key
from ziplm_deploy.baselines import BASELINES, Baseline, BaselineRecord, DenseSource, get_baseline
from ziplm_deploy.engines import get_engine
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.engines.trial import Trial
from ziplm_deploy.errors import EngineError, RecipeError
from ziplm_deploy.latency.benchmark import TimedFile, start_worker
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.models.member_files import load
from ziplm_deploy.recipe import Recipe, Variant
from ziplm_deploy.run.baseline import BaselineFiles
from ziplm_deploy.run.data import filled_up
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import check_difference, export_checked
from ziplm_deploy.stages.recover import train_dense_on
from ziplm_deploy.stages.stage import Stage

N_CALIBRATION = 128  # examples, as many as the stock exports take


def make_baselines(run: Run) -> None:
    """Make the baselines that the recipe asks for, or all that can be made here; leave a note on the others.

    Raises:
        EngineError: one that the recipe names cannot be made.
    """
    asked = run.recipe.benchmark.baselines
    for name in BASELINES:
        files = BaselineFiles(name, run.folder.path)
        note = None
        if _is_asked(run.recipe, name):
            refused = _make(run, files)
            if refused and asked is not None:
                raise EngineError(refused)
            note = f"baseline {name} was not measured: {refused}" if refused else None
        else:
            _remove(files)
            if files.page.trains and distributed.is_first():
                shutil.rmtree(run.folder.dense_trained_on.folder, ignore_errors=True)
            run.folder.set_note(f"scores of baseline {name}", None)
        run.folder.set_note(f"baseline {name}", note)


def check_baselines(recipe: Recipe) -> None:
    """Refuse baselines that the recipe names and that cannot be made here.

    Raises:
        EngineError: tool or engine are missing; says which command brings them.
    """
    for name in recipe.benchmark.baselines or ():
        baseline = get_baseline(name)
        if baseline.trains and not recipe.recover.teaches_more_than_dense:
            raise RecipeError(
                f"expected training in which the dense model learns something, too, for the baseline {name}, found "
                f"recover.mode: {recipe.recover.mode} without labels (task_weight) or another teacher; leave it out of "
                "benchmark.baselines"
            )
        get_engine(baseline.engine).version()
        baseline.tool()
        baseline.settings(machine_info())


def made_baselines(run: Run) -> list[BaselineFiles]:
    """Baselines that the run has."""
    places = (BaselineFiles(name, run.folder.path) for name in BASELINES if _is_asked(run.recipe, name))
    return [files for files in places if all(path.exists() for path in (files.record, *files.paths))]


def _is_asked(recipe: Recipe, name: str) -> bool:
    """Whether the recipe names a baseline; without a choice all are asked for that can tell anything."""
    asked = recipe.benchmark.baselines
    if asked is None:
        return not get_baseline(name).trains or recipe.recover.teaches_more_than_dense
    return name in asked


def _make(run: Run, files: BaselineFiles) -> str:
    """Make one baseline; returns why it cannot be made, or nothing."""
    page, machine, stage = files.page, machine_info(), f"baseline {files.name}"
    if run.task.is_causal and (not page.of_causal or run.recipe.environment.runs_gguf):
        _remove(files)
        beside = " beside files of llama.cpp" if run.recipe.environment.runs_gguf else ""
        return f"nothing stock is made for {run.recipe.model.task}{beside} yet"
    try:
        get_engine(page.engine).version()
        made_by = BaselineRecord(tool=page.tool(), settings=page.settings(machine))
    except EngineError as error:
        _remove(files)
        return str(error)
    dense = run.dense_member.file(Variant.FP32).path
    if page.trains:
        train_dense_on(run)
    key = content_key(
        dense=run.file_hash(dense),
        tool=made_by.tool,
        settings=made_by.settings,
        calibration=run.data.calibration_key if page.calibrates else None,
        **({"trained_on": run.file_hash(run.folder.dense_trained_on.weights)} if page.trains else {}),
    )

    def export_trained_on(path: Path) -> None:
        member = run.folder.dense_trained_on
        run.folder.set_difference(stage, export_checked(run, load(member.folder), path, member.name))

    source = DenseSource(dense, lambda: run.dense.model, lambda: _batches(run), machine, export_trained_on)

    def work() -> None:
        _remove(files)
        refused = ""
        try:
            with atomic_folder(files.folder) as making:
                page.make(source, making)
                _try(run, page, making / page.files[0])
        except EngineError as error:  # other processes of this launch read it; the next run tries again
            refused = str(error)
        made_by.model_copy(update={"refused": refused}).save(files.record)

    run.folder.make(stage, key, [files.record, *files.paths], work)
    check_difference(run, stage)
    return BaselineRecord.load(files.record).refused


def _try(run: Run, page: Baseline, path: Path) -> None:
    """Run a file once, and on an example where it will be scored; raises :class:`EngineError` where its engine cannot.

    That would end the benchmark of all, or the evaluation.
    """
    environment = run.recipe.environment.model_copy(update={"engine": page.engine})
    with Trial(lambda: start_worker(TimedFile(path, page.engine), run.recipe.environment)) as trial:
        trial.run(path)
    if not page.answers_as_dense:
        with open_runner(environment, path) as answer:
            answer(_example(run))


def _example(run: Run) -> dict[str, np.ndarray]:
    """Inputs of a call: one example, or as many as static shapes hold, perhaps one again and again."""
    recipe = run.recipe
    size = recipe.environment.workload.batch_size if recipe.export.shapes == "static" else 1
    filled = None if run.task.is_causal else recipe.environment.workload.seq_len  # windows of text are full
    one = run.data.encode(run.data.calibration_rows[:1], 1, filled)[0]
    return {name: value.numpy() for name, value in filled_up(one, size).items()}


def _batches(run: Run) -> Sequence[dict[str, np.ndarray]]:
    """Calibration inputs, one example a call, padded to the tokens that are served; whole calls for static shapes.

    Where there are fewer examples than such a call holds, they are repeated.
    """
    recipe = run.recipe
    size = recipe.environment.workload.batch_size if recipe.export.shapes == "static" else 1
    rows = run.data.calibration_rows[: max(N_CALIBRATION, size)]
    batches = run.data.encode(rows, size, recipe.environment.workload.seq_len)
    whole = [batch for batch in batches if len(next(iter(batch.values()))) == size] or [filled_up(batches[0], size)]
    return [{name: value.numpy() for name, value in batch.items()} for batch in whole]


def _remove(files: BaselineFiles) -> None:
    if distributed.is_first():
        shutil.rmtree(files.folder, ignore_errors=True)
        for path in (files.record, files.scores, files.outcomes):
            path.unlink(missing_ok=True)


STAGE = Stage(
    "baselines",
    lambda run: "what users get from the dense model without pruning",
    make_baselines,
    shown=lambda recipe: recipe.benchmark.measures_baselines,
)
