"""Measure (or take over) the latency table; refuse unreachable targets before any long work."""

from __future__ import annotations

from ziplm_deploy.artifacts import content_key, source_hash
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.engines import get_engine
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.request import TableRequest, check_table
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import check_threads, machine_info
from ziplm_deploy.models.deployed import FLOAT32, with_embedding_head
from ziplm_deploy.pruning.planner import check_target
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.baselines import check_baselines
from ziplm_deploy.stages.checks import check_compression, check_data, check_lengths, check_task
from ziplm_deploy.stages.formats import check_formats
from ziplm_deploy.stages.stage import Stage


def make_profile(run: Run) -> LatencyTable:
    """``profile.json``: the table that this run plans with.

    Raises:
        TargetUnreachableError: the table rules a target out.
        IncompatibleArtifactError: the given table does not fit.  EngineError: an engine is missing or fails.
    """
    recipe = run.recipe
    check_threads(recipe.environment.threads)
    check_task(recipe)
    check_compression(recipe)
    check_baselines(recipe)
    check_lengths(run)
    check_formats(run)
    check_data(run)
    run.folder.make("profile", profile_key(run), [run.folder.profile], lambda: _profile(run))
    table = LatencyTable.load(run.folder.profile)
    _check_given(run, table)
    left_out = f"{table.engine} cannot run these blocks, so no plan has them: {', '.join(table.refused)}"
    run.folder.set_note("refused cells", left_out if table.refused else None)
    for target in recipe.speedups:
        check_target(table, target)
    return table


def profile_key(run: Run) -> str:
    """Everything that the table depends on."""
    recipe = run.recipe
    given, request = recipe.profile.table, table_request(run)
    served = request.served
    return content_key(
        shape=run.dense.shape,
        wholes="a process each",  # tables from before had all models in one
        machine=machine_info().fingerprint,
        engines=[[name, get_engine(name).version()] for name in (recipe.environment.engine, recipe.baseline_engine)],
        variant=None if served is FLOAT32 else [served.variant, served.description],
        environment=recipe.environment.fingerprint,
        profile=recipe.profile.model_dump(exclude={"table", "allow_foreign_table"}) if given is None else None,
        graph=request.graph,
        export=recipe.export.model_dump(include={"shapes", "opset"}),
        given=source_hash(str(given)) if given else None,
    )


def table_request(run: Run) -> TableRequest:
    """What the latency table of a run must be of."""
    recipe = run.recipe
    return TableRequest(
        run.dense.model,
        tuple(run.onnx_export.output_names),
        recipe.environment,
        recipe.profile,
        recipe.export,
        wrap=lambda model: with_embedding_head(model, recipe.model, recipe.export),
        treatment=target_treatment(recipe) or FLOAT32,
        baseline_engine=recipe.baseline_engine,
    )


def check_taken_table(run: Run) -> None:
    """Refuse the table that a run was made with where the recipe would not take it any more.

    Raises:
        IncompatibleArtifactError: it does not fit, or is of another machine.
    """
    _check_given(run, LatencyTable.load(run.folder.profile))


def _check_given(run: Run, table: LatencyTable) -> None:
    """Refuse a given table that does not fit; also one taken over before, as what is accepted is in no key."""
    recipe, note = run.recipe, None
    if recipe.profile.table is not None:
        check_table(table, table_request(run), allow_foreign=recipe.profile.allow_foreign_table)
        here, there = machine_info().fingerprint, table.machine.fingerprint
        if here != there:
            note = (
                f"the latency table is of another machine ({there}; here {here}): predicted speedups may be far off, "
                "measured ones are not"
            )
    run.folder.set_note("foreign table", note)


def _profile(run: Run) -> None:
    recipe, request = run.recipe, table_request(run)
    if recipe.profile.table is not None:
        table = LatencyTable.load(recipe.profile.table)
        _check_given(run, table)
    else:
        table = measure_table(request, run.progress.step, recipe.seed, note=run.progress.note)
    table.save(run.folder.profile)


STAGE = Stage("profile", lambda run: "latency table of every sub-block shape, measured on this CPU", make_profile)
