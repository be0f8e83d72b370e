"""The whole way, in order: profile, train dense (optional), calibrate, prune, export, benchmark (closed loop), recover
(optional), compress (optional), evaluate, report.

Read :func:`run` first. Every stage is a function of a :class:`Run`; it reads and writes files of the run folder and is
skipped when nothing it depends on has changed, so a killed run goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from ziplm_deploy.artifacts import content_key, source_hash
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.engines import get_engine
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.latency import profile as profiling
from ziplm_deploy.latency.benchmark import TimedFile, compare
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.request import TableRequest, check_table
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import check_threads, machine_info
from ziplm_deploy.models.deployed import FLOAT32
from ziplm_deploy.progress import Progress
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.pruning.planner import check_target
from ziplm_deploy.recipe import Recipe, Variant, file_label
from ziplm_deploy.reporting import collect as family
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.run.run import Run, Step
from ziplm_deploy.stages import closed_loop
from ziplm_deploy.stages import evaluate as evaluation
from ziplm_deploy.stages import export as members
from ziplm_deploy.stages import timed_files as subjects
from ziplm_deploy.stages.checks import check_compression


def run(recipe: Recipe, progress: Progress | None = None) -> FamilyReport:
    """A checkpoint goes in, a family of measured ONNX models comes out.

    Raises:
        ZipLMError: see :mod:`ziplm_deploy.errors`; nothing half-written is left behind.
    """
    state = Run(recipe, progress)
    measured(state)
    evaluate(state)
    return report(state)


def measured(state: Run) -> BenchmarkRecord:
    """All files of all members, the targets reached if they can be."""
    build(state)
    compress(state)
    while closed_loop.compensate_float32(state, record := benchmark(state)):
        build(state)
        compress(state)
    return record


def build(state: Run) -> None:
    """Every member as it will serve: planned, fast enough, trained if the recipe says so, exported."""
    profile(state)
    train_dense(state)
    for step in state.steps:  # one for all targets; one for each where a member is pruned from the one before
        calibrate(state, step)
        prune(state, step)
        export_pruned(state, step)
        reach_targets(state, step)
        recover(state, step)
    export(state)


def profile(state: Run) -> LatencyTable:
    """Measure (or take over) the latency table; refuse unreachable targets before any long work."""
    recipe = state.recipe
    state.begin("profile", "latency table of every sub-block shape, measured on this CPU")
    check_threads(recipe.environment.threads)
    check_compression(recipe)
    state.check_data()
    given, form = recipe.profile.table, target_treatment(recipe)
    key = content_key(
        shape=state.shape,
        wholes="a process each",  # tables from before had all models in one
        machine=machine_info().fingerprint,
        engines=[[name, get_engine(name).version()] for name in (recipe.environment.engine, recipe.baseline_engine)],
        variant=None if form is None else [form.variant, form.description],
        environment=recipe.environment,
        profile=recipe.profile.model_dump(exclude={"table", "allow_foreign_table"}) if given is None else None,
        graph=table_request(state).graph,
        export=recipe.export.model_dump(include={"shapes", "opset"}),
        given=source_hash(str(given)) if given else None,
    )
    state.folder.stage("profile", key, [state.folder.profile], lambda: _profile(state))
    table = LatencyTable.load(state.folder.profile)
    left_out = f"{table.engine} cannot run these blocks, so no plan has them: {', '.join(table.refused)}"
    state.folder.set_note("refused cells", left_out if table.refused else None)
    for target in recipe.speedups:
        check_target(table, target)
    return table


def _profile(state: Run) -> None:
    recipe, request = state.recipe, table_request(state)
    if recipe.profile.table is not None:
        table = LatencyTable.load(recipe.profile.table)
        check_table(table, request, allow_foreign=recipe.profile.allow_foreign_table)
    else:
        table = profiling.measure_table(request, state.progress.step, recipe.seed)
    table.save(state.folder.profile)


def table_request(state: Run) -> TableRequest:
    """What the latency table of a run must be of."""
    recipe = state.recipe
    return TableRequest(
        state.dense,
        tuple(members.output_names(state.task, recipe.export)),
        recipe.environment,
        recipe.profile,
        recipe.export,
        wrap=lambda model: members.deployed_form(model, recipe.model, recipe.export),
        treatment=target_treatment(recipe) or FLOAT32,
        baseline_engine=recipe.baseline_engine,
    )


def train_dense(state: Run) -> None:
    """Fine-tune the recipe's base checkpoint for its task, where ``dense.train`` asks for it."""
    if state.recipe.dense.train:
        from ziplm_deploy.stages.train_dense import train_dense as train

        state.begin("train dense", f"{state.recipe.model.path} for {state.recipe.model.task}")
        train(state)


def calibrate(state: Run, step: Step) -> None:
    """One Hessian pass over a parent and the database of levels that serves all targets pruned from it."""
    state.begin("calibrate", f"Hessians of {step.parent} and the database of OBS levels")
    parent = state.parent(step.parent)
    stage = "calibrate" if step.parent == DENSE else f"calibrate {step.parent}"
    state.folder.stage(stage, parent.key(), [parent.database_path], parent.build_database)


def prune(state: Run, step: Step) -> None:
    """A plan and a physically smaller model for every target."""
    state.begin("prune", f"plans for {', '.join(map(state.member_name, step.targets))}")
    closed_loop.start_from_last_bias(state, step)
    for target in step.targets:
        members.prune_member(state, target)


def export_pruned(state: Run, step: Step) -> None:
    """``model.onnx`` of the dense model and of the pruned ones, checked against torch."""
    state.begin("export", "ONNX files, checked against torch")
    members.export_dense(state)
    for name in map(state.member_name, step.targets):
        members.export_pruned(state, name)


def reach_targets(state: Run, step: Step) -> BenchmarkRecord:
    """Measure the pruned models against the dense one; solve again those that miss their target."""
    state.begin("benchmark", "the dense model and the pruned ones, interleaved")
    path = state.folder.step_benchmark(step.parent)
    stage = "benchmark" if path == state.folder.benchmark else f"benchmark of {step.parent}"

    def measure() -> BenchmarkRecord:
        return _measure(state, stage, path, subjects.files_of_generation(state, step.targets))

    return closed_loop.reach_targets(state, step, measure)


def recover(state: Run, step: Step) -> None:
    """Train the pruned models towards the teacher's answers, where the recipe asks for it."""
    if not state.trains:
        return
    from ziplm_deploy.stages.recover import recover_member

    state.begin("recover", f"distillation into {', '.join(map(state.member_name, step.targets))}")
    for target in step.targets:
        recover_member(state, state.member_name(target))


def export(state: Run) -> None:
    """``model.onnx`` of every trained member; the others have theirs already."""
    if not state.trains:
        return
    state.begin("export", "the trained models as ONNX files, checked against torch")
    for name in map(state.member_name, state.recipe.speedups):
        members.export_member(state, name, state.folder.member(name))


def compress(state: Run) -> None:
    """The further files of every member and of the dense model: zeros in their weights, 8-bit integers."""
    from ziplm_deploy.stages.sparsify import compress_member, remove_unlisted

    if not state.recipe.compress.variants:
        for name in state.names:
            remove_unlisted(state, name)
        return
    state.begin("compress", f"{', '.join(state.recipe.compress.variants)} of every member")
    for name in state.names:
        compress_member(state, name)
    subjects.try_files(state)


def benchmark(state: Run) -> BenchmarkRecord:
    """All files of all members as they will serve against the dense model, in one run."""
    if state.recipe.finishes_after_pruning:  # else the closed loop has measured these very files
        state.begin("benchmark", "all members and the dense model, interleaved")
    return _measure(state, "benchmark", state.folder.benchmark, subjects.files_of_family(state))


def _measure(state: Run, stage: str, path: Path, timed: dict[str, TimedFile]) -> BenchmarkRecord:
    recipe = state.recipe

    def work() -> None:
        compare(timed, recipe.environment, recipe.benchmark, DENSE, state.progress.step).save(path)

    state.folder.stage(stage, benchmark_key(state, timed), [path], work)
    return BenchmarkRecord.load(path)


def benchmark_key(state: Run, timed: dict[str, TimedFile]) -> str:
    """What a benchmark depends on: the files themselves, where they run and how they are timed."""
    recipe = state.recipe
    return content_key(
        files={name: state.file_hash(subject.path) for name, subject in timed.items()},
        baseline_engine=[recipe.baseline_engine, get_engine(recipe.baseline_engine).version()],
        environment=recipe.environment,
        benchmark=recipe.benchmark.model_dump(include={"rounds", "processes", "runs_per_round", "max_seconds"}),
        machine=machine_info().fingerprint,
        engine=get_engine(recipe.environment.engine).version(),
    )


def evaluate(state: Run) -> None:
    """The task's metric of every ONNX file, run in the engine that will serve it."""
    state.begin("evaluate", "accuracy of the ONNX files themselves")
    if state.recipe.data.evaluation is None:
        state.progress.note("no data.evaluation in the recipe: accuracy is not reported")
        return
    refused = subjects.refused_files(state)
    files = [
        (name, state.folder.member(name), variant)
        for name in state.names
        for variant in state.recipe.variants
        if file_label(name, variant) not in refused
    ]
    if state.trains:
        pruned = [name for name in state.names if name != DENSE and name not in refused]
        files += [(name, state.folder.pruned(name), Variant.FP32) for name in pruned]
    dense_path = state.folder.member(DENSE) / "model.onnx"
    baseline = state.recipe.environment.model_copy(update={"engine": state.recipe.baseline_engine})
    with open_runner(baseline, dense_path) as runner:
        dense_run = evaluation.cache_embeddings(runner)
        for index, (name, folder, variant) in enumerate(files):
            evaluation.evaluate_member(state, name, folder, dense_run, variant)
            state.progress.step(index + 1, len(files))


def report(state: Run) -> FamilyReport:
    """``report.json``, ``report.md`` and a model card in every member's folder."""
    state.begin("report", "report and model cards")
    state.folder.save()  # also when every stage was skipped: the recipe may differ in what only the report reads
    return family.write_report(state)
