"""The task's metric of every file, run by the engine that will serve it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ziplm_deploy.artifacts import content_key, source_hash
from ziplm_deploy.engines import get_engine
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.errors import EngineError
from ziplm_deploy.recipe import EngineName, Variant
from ziplm_deploy.run import gguf
from ziplm_deploy.run.answers import Answers
from ziplm_deploy.run.baseline import BaselineFiles
from ziplm_deploy.run.gguf import GgufFile
from ziplm_deploy.run.member import ModelFile
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.baselines import made_baselines
from ziplm_deploy.stages.continuations import continue_texts
from ziplm_deploy.stages.formats import measured_gguf_files
from ziplm_deploy.stages.gains import compare_with_baselines
from ziplm_deploy.stages.retrieval import score_retrieval
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import refused_files, runnable_files
from ziplm_deploy.stages.uncertainty import estimate_uncertainty
from ziplm_deploy.tasks.evaluation_set import cache_embeddings
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.record import Scores


def evaluate(run: Run) -> None:
    """Scores of all files, those from before training included, and what they find where there is data to search."""
    recipe = run.recipe
    score_retrieval(run)
    if recipe.data.evaluation is None:
        searched = "; retrieval is" if recipe.data.retrieval is not None else ""
        run.progress.note(f"no data.evaluation in the recipe: accuracy is not reported{searched}")
        return
    files = runnable_files(run)
    if run.trains:
        refused = refused_files(run)
        files += [member.as_pruned for member in run.pruned_members if member.name not in refused]
    reference = run.dense_member.as_exported
    with run.answers.take(reference.path, reference.variant, recipe.baseline_engine) as dense:
        for index, file in enumerate(files):
            evaluate_file(run, file, dense)
            run.progress.step(index + 1, len(files))
        for each in made_baselines(run):
            if not each.page.answers_as_dense:
                evaluate_baseline(run, each, dense)
        on_llama_cpp = measured_gguf_files(run)
        for index, each_gguf in enumerate(on_llama_cpp):
            evaluate_gguf(run, each_gguf, dense)
            run.progress.step(index + 1, len(on_llama_cpp))
    continue_texts(run)
    estimate_uncertainty(run, [*files, *on_llama_cpp])
    compare_with_baselines(run, files)


def evaluate_file(run: Run, file: ModelFile, dense: Answers) -> None:
    """Write the scores of a file beside it; fidelity to the dense file too, where the task has one.

    ``dense``: the dense model in the engine of the baseline.
    """
    recipe, data = run.recipe, run.data.evaluation_set(file.variant)
    is_baseline = file == run.dense_member.as_exported
    engine = recipe.baseline_engine if is_baseline else recipe.environment.engine
    key = content_key(
        file=run.file_hash(file.path),
        dense=run.file_hash(run.dense_member.as_exported.path),
        **({"engine": engine} if recipe.baseline_engine != recipe.environment.engine else {}),
        engines=run.engine_versions,
        batch_size=data.batch_size,
        data=run.data.evaluation_key,
    )

    def work() -> None:
        fidelity: dict[str, float] = {}
        if is_baseline:
            outcomes = dense.outcomes
        else:
            with run.answers.take(file.path, file.variant, engine) as own:
                outcomes, fidelity = own.beside(dense)
        _save(run, file, outcomes, fidelity, engine, run.engine_versions[engine])

    stage = f"evaluate pruned {file.label}" if file.is_before_training else f"evaluate {file.label}"
    run.folder.make(stage, key, [file.scores, file.outcomes], work)


def evaluate_baseline(run: Run, baseline: BaselineFiles, dense: Answers) -> None:
    """Write the scores of a baseline, on its own engine; ``dense`` as in :func:`evaluate_file`.

    Raises:
        EngineError: the engine fails over an example. Unless the recipe names the baseline, a note says so instead.
    """
    engine = baseline.page.engine
    version = get_engine(engine).version()
    data = run.data.evaluation_set_of(as_served=baseline.page.scales_span_batch)
    key = content_key(
        file=source_hash(str(baseline.folder)),
        dense=run.file_hash(run.dense_member.as_exported.path),
        engine=version,
        batch_size=data.batch_size,
        data=run.data.evaluation_key,
    )

    note: list[str] = []

    def work() -> None:
        baseline.scores.unlink(missing_ok=True)
        environment = run.recipe.environment.model_copy(update={"engine": engine})
        try:
            with open_runner(environment, baseline.paths[0]) as runner:
                own = cache_embeddings(runner)
                outcomes, fidelity = run.task.outcomes_and_fidelity(own, dense.function, data, dense.data)
        except EngineError as error:
            if run.recipe.benchmark.baselines is not None:
                raise
            note.append(f"baseline {baseline.name} was not scored: {error}")
            return
        _save(run, baseline, outcomes, fidelity, engine, version)

    run.folder.make(f"evaluate baseline {baseline.name}", key, [baseline.scores, baseline.outcomes], work)
    run.folder.set_note(f"scores of baseline {baseline.name}", note[0] if note else None)


def evaluate_gguf(run: Run, file: GgufFile, dense: Answers) -> None:
    """Write the scores of a GGUF file in llama.cpp, which reads one window after the other; ``dense`` as above."""
    version = get_engine(gguf.ENGINE).version()
    data = replace(run.data.evaluation_set(Variant.FP32), batch_size=1)
    key = content_key(
        file=run.file_hash(file.path),
        dense=run.file_hash(run.dense_member.as_exported.path),
        engine=version,
        data=run.data.evaluation_key,
    )

    def work() -> None:
        environment = run.recipe.environment.model_copy(update={"engine": gguf.ENGINE})
        with open_runner(environment, file.path) as runner:
            outcomes, fidelity = run.task.outcomes_and_fidelity(runner, dense.function, data, dense.data)
        _save(run, file, outcomes, fidelity, gguf.ENGINE, version)

    run.folder.make(f"evaluate {file.label}", key, [file.scores, file.outcomes], work)


def _save(
    run: Run,
    file: ModelFile | BaselineFiles | GgufFile,
    outcomes: Outcomes,
    fidelity: dict[str, float],
    engine: EngineName,
    engine_version: str,
) -> None:
    Scores(
        metric=run.task.metric_name,
        scores=run.task.scores(outcomes) | fidelity,
        by_label=run.task.label_scores(outcomes, run.dense.model.config),
        n_rows=len(run.data.evaluation_rows),
        engine=engine,
        engine_version=engine_version,
        examples=run.data.evaluation_rows_key,
        outcomes_hash=outcomes.save(file.outcomes),
    ).save(file.scores)


def score_of(run: Run, path: Path, variant: Variant, engine: EngineName | None = None) -> float:
    """The task's primary metric of an ONNX file of this form; ``engine``: another one than that of the environment."""
    return run.task.scores(outcomes_on(run, path, variant, engine))[run.task.metric_name]


def outcomes_on(run: Run, path: Path, variant: Variant, engine: EngineName | None = None) -> Outcomes:
    """What an ONNX file does on every evaluation example; arguments as for :func:`score_of`."""
    environment = run.recipe.environment
    if engine is not None:
        environment = environment.model_copy(update={"engine": engine})
    with open_runner(environment, path) as runner:
        return run.task.outcomes(runner, run.data.evaluation_set(variant))


def scores_of(run: Run, file: ModelFile | BaselineFiles | GgufFile) -> dict[str, float]:
    """Scores of a file, the primary metric first; empty when it was not evaluated."""
    if run.recipe.data.evaluation is None or not file.scores.exists():
        return {}
    return Scores.load(file.scores).scores


def label_scores_of(run: Run, file: ModelFile) -> dict[str, float]:
    """F1 of a file on every class; empty when it was not evaluated, or the task has none."""
    if run.recipe.data.evaluation is None or not file.scores.exists():
        return {}
    return Scores.load(file.scores).by_label


def outcomes_of(run: Run, file: ModelFile | BaselineFiles) -> Outcomes | None:
    """What a file did on every evaluation example; None where it was not evaluated, or before that was kept.

    Raises:
        CorruptArtifactError: the file is missing, damaged, or not the one that the scores were computed from.
    """
    if run.recipe.data.evaluation is None or not file.scores.exists():
        return None
    expected_hash = Scores.load(file.scores).outcomes_hash
    return None if expected_hash is None else Outcomes.load(file.outcomes, expected_hash)


STAGE = Stage("evaluate", lambda run: "accuracy of the files themselves", evaluate)
