"""The whole way, in order: profile, calibrate, prune, export, benchmark (closed loop), evaluate, report.

Read :func:`run` first. Every stage is a function of a :class:`Run`; it reads and writes files of the run folder and is
skipped when nothing it depends on has changed, so a killed run goes on where it was.
"""

from __future__ import annotations

from ziplm_deploy import closed_loop, evaluation, members, profiling
from ziplm_deploy.artifacts import BenchmarkRecord, FamilyReport, LatencyTable
from ziplm_deploy.benchmarking import compare
from ziplm_deploy.config import Recipe
from ziplm_deploy.engines import get_engine
from ziplm_deploy.machine import check_threads, machine_info
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.planner import check_target
from ziplm_deploy.reporting import family
from ziplm_deploy.run import DENSE, Run
from ziplm_deploy.run_folder import content_key, source_hash


def run(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """A checkpoint goes in, a family of measured ONNX models comes out.

    Raises:
        ZipLMError: see :mod:`ziplm_deploy.errors`; nothing half-written is left behind.
    """
    state = Run(recipe, progress)
    profile(state)
    calibrate(state)
    prune(state)
    export(state)
    benchmark(state)
    evaluate(state)
    return report(state)


def profile(state: Run) -> LatencyTable:
    """Measure (or take over) the latency table; refuse unreachable targets before any long work."""
    recipe = state.recipe
    state.begin("profile", "latency table of every sub-block shape, measured on this CPU")
    check_threads(recipe.environment.threads)
    state.check_data()
    given = recipe.profile.table
    key = content_key(
        shape=state.shape,
        machine=machine_info().fingerprint,
        engine=get_engine(recipe.environment.engine).version(),
        environment=recipe.environment,
        profile=recipe.profile.model_dump(exclude={"table", "allow_foreign_table"}) if given is None else None,
        graph=profiling.graph_of(state.dense, members.output_names(state.task, recipe.export)),
        export=recipe.export.model_dump(include={"shapes", "opset"}),
        given=source_hash(str(given)) if given else None,
    )
    state.folder.stage("profile", key, [state.folder.profile], lambda: _profile(state))
    table = LatencyTable.load(state.folder.profile)
    for target in recipe.speedups:
        check_target(table, target)
    return table


def _profile(state: Run) -> None:
    recipe = state.recipe
    if recipe.profile.table is not None:
        table = LatencyTable.load(recipe.profile.table)
        engine = get_engine(recipe.environment.engine)
        profiling.check_table(
            table,
            machine=machine_info(),
            engine=engine.name,
            engine_version=engine.version(),
            environment=recipe.environment,
            shape=state.shape,
            shapes=recipe.export.shapes,
            opset=recipe.export.opset,
            graph=profiling.graph_of(state.dense, members.output_names(state.task, recipe.export)),
            allow_foreign=recipe.profile.allow_foreign_table,
        )
    else:
        table = profiling.measure_table(
            state.dense,
            recipe.environment,
            recipe.profile,
            recipe.export,
            output_names=members.output_names(state.task, recipe.export),
            wrap=lambda model: members.deployed_form(model, recipe.model, recipe.export),
            progress=state.progress.step,
            seed=recipe.seed,
        )
    table.save(state.folder.profile)


def calibrate(state: Run) -> None:
    """One Hessian pass and the database of levels that serve every target."""
    state.begin("calibrate", "Hessians and the database of OBS levels")
    state.folder.stage("calibrate", state.database_key(), [state.folder.database], state.build_database)


def prune(state: Run) -> None:
    """A plan and a physically smaller model for every target."""
    state.begin("prune", f"plans for {', '.join(map(state.member_name, state.recipe.speedups))}")
    for target in state.recipe.speedups:
        members.prune_member(state, target)


def export(state: Run) -> None:
    """``model.onnx`` of the dense model and of every member, checked against torch."""
    state.begin("export", "ONNX files, checked against torch")
    for name in state.names:
        members.export_member(state, name)


def benchmark(state: Run) -> BenchmarkRecord:
    """Measure all members against the dense model; solve again those that miss their target."""
    state.begin("benchmark", "all members and the dense model, interleaved")
    return closed_loop.reach_targets(state, _measure)


def _measure(state: Run) -> BenchmarkRecord:
    recipe = state.recipe
    files, folder = state.onnx_files, state.folder

    def work() -> None:
        record = compare(
            files, recipe.environment, recipe.benchmark, DENSE, state.progress.step, shapes=recipe.export.shapes
        )
        record.save(folder.benchmark)

    folder.stage("benchmark", benchmark_key(state), [folder.benchmark], work)
    return BenchmarkRecord.load(folder.benchmark)


def benchmark_key(state: Run) -> str:
    """What a benchmark depends on: the files themselves, where they run and how they are timed."""
    recipe = state.recipe
    return content_key(
        files={name: state.file_hash(path) for name, path in state.onnx_files.items()},
        environment=recipe.environment,
        benchmark=recipe.benchmark.model_dump(include={"rounds", "runs_per_round", "max_seconds"}),
        machine=machine_info().fingerprint,
        engine=get_engine(recipe.environment.engine).version(),
    )


def evaluate(state: Run) -> None:
    """The task's metric of every ONNX file, run in the engine that will serve it."""
    state.begin("evaluate", "accuracy of the ONNX files themselves")
    if state.recipe.data.evaluation is None:
        state.progress.note("no data.evaluation in the recipe: accuracy is not reported")
        return
    for index, name in enumerate(state.names):
        evaluation.evaluate_member(state, name)
        state.progress.step(index + 1, len(state.names))


def report(state: Run) -> FamilyReport:
    """``report.json``, ``report.md`` and a model card in every member's folder."""
    state.begin("report", "report and model cards")
    state.folder.save()  # also when every stage was skipped: the recipe may differ in what only the report reads
    return family.write_report(state)
