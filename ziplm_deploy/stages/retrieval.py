"""What the ONNX files of embedding models find: with passages embedded by each file, and by the dense one.

The dense model embeds everything once, its other tower too where there is one; that stays in the run folder.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save_file

from ziplm_deploy.artifacts import content_key, file_hash, write_bytes_with
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.recipe import EngineName, Variant
from ziplm_deploy.reporting.embeddings import embeddings_file, load_embeddings
from ziplm_deploy.run.member import ModelFile
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.timed_files import runnable_files
from ziplm_deploy.tasks.batching import length_limit
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.resampling import N_RESAMPLES, ResampledScores
from ziplm_deploy.tasks.retrieval_scores import FileRetrieval, RetrievalScores
from ziplm_deploy.tasks.search import Embedded


def score_retrieval(run: Run) -> None:
    """Write the retrieval scores of all files; nothing without ``data.retrieval``."""
    if run.recipe.data.retrieval is None:
        run.folder.set_note("cut passages", None)
        return
    dense = run.dense_member.file(Variant.FP32)
    _embed_dense(run, dense)
    files = [dense, *(file for file in runnable_files(run) if file != dense)]
    for index, file in enumerate(files):
        _search(run, file)
        run.progress.step(index + 1, len(files))
    hashes = {file.label: file_hash(_outcomes(run, file)) for file in files}
    key = content_key(outcomes=hashes, seed=run.recipe.seed, n_resamples=N_RESAMPLES)
    path = run.folder.retrieval_scores
    run.folder.make("retrieval scores", key, [path], lambda: _scores(run, files).save(path))


def retrieval_scores_of(run: Run) -> RetrievalScores | None:
    """What the last evaluation left; None where the recipe asks for none, or there was no evaluation yet."""
    path = run.folder.retrieval_scores
    return None if run.recipe.data.retrieval is None or not path.exists() else RetrievalScores.load(path)


def _embeddings(run: Run, file: ModelFile) -> Path:
    """Embeddings by a file; beside those by the dense one what else is known of the set."""
    return embeddings_file(run.folder.path, file.label)


def _outcomes(run: Run, file: ModelFile) -> Path:
    return _embeddings(run, file).with_suffix(".json")


def _embed_dense(run: Run, dense: ModelFile) -> None:
    key = _key(run, dense, dense)
    path = _embeddings(run, dense)

    def work() -> None:
        tensors = _embed(run, dense) | run.data.retrieval.embed_fixed()
        write_bytes_with(path, lambda target: save_file(tensors, target))
        run.folder.set_note("cut passages", cut_passages_note(run))

    run.folder.make("embed passages", key, [path], work)


def cut_passages_note(run: Run) -> str | None:
    """How many passages lose their ends, where no query finds anything; None where all are whole."""
    processor = run.dense.processor
    lengths = run.data.retrieval.passage_lengths(processor)
    asked = run.recipe.data.passage_length or run.recipe.environment.workload.seq_len
    limit = length_limit(processor, asked) if lengths else 0
    cut = sum(length > limit for length in lengths)
    if not cut:
        return None
    return (
        f"{cut / len(lengths):.1%} of the passages of data.retrieval ({cut:,} of {len(lengths):,}, the longest "
        f"{max(lengths):,} tokens) are longer than {limit} tokens and were cut: no query finds what stood behind; a "
        "larger data.passage_length keeps them whole, where the model has positions for it"
    )


def _search(run: Run, file: ModelFile) -> None:
    """Write what a file finds for every query."""
    dense = run.dense_member.file(Variant.FP32)
    path, kept = _outcomes(run, file), _embeddings(run, file)
    keeps = file != dense and run.data.searches_images  # for those who compare them with embeddings by another run

    def work() -> None:
        known = _dense_embeddings(run)
        own = known if file == dense else _embed(run, file)
        if keeps:
            write_bytes_with(kept, lambda target: save_file(own, target))
        run.data.retrieval.found(own, known).save(path)

    run.folder.make(f"retrieval {file.label}", _key(run, file, dense), [path, *([kept] if keeps else [])], work)


def _key(run: Run, file: ModelFile, dense: ModelFile) -> str:
    has_two = run.recipe.baseline_engine != run.recipe.environment.engine
    return content_key(
        file=run.file_hash(file.path),
        dense=run.file_hash(dense.path),
        **({"engine": _engine_of(run, file)} if has_two else {}),
        engines=run.engine_versions,
        batch_size=run.data.passages_taken_by(file.variant).batch_size,
        data=run.data.retrieval_key,
    )


def _engine_of(run: Run, file: ModelFile) -> EngineName:
    is_baseline = file == run.dense_member.file(Variant.FP32)
    return run.recipe.baseline_engine if is_baseline else run.recipe.environment.engine


def _embed(run: Run, file: ModelFile) -> Embedded:
    """What one file embeds, on the engine that serves it."""
    environment = run.recipe.environment.model_copy(update={"engine": _engine_of(run, file)})
    how = run.data.passages_taken_by(file.variant)
    with open_runner(environment, file.path) as runner:
        return run.data.retrieval.embed_own(runner, how)


def _dense_embeddings(run: Run) -> Embedded:
    return load_embeddings(_embeddings(run, run.dense_member.file(Variant.FP32)))


def _scores(run: Run, files: list[ModelFile]) -> RetrievalScores:
    retrieval, seed = run.data.retrieval, run.recipe.seed
    paths = {file.label: _outcomes(run, file) for file in files}
    resampled = {
        label: ResampledScores(retrieval, Outcomes.load(path, file_hash(path)), seed) for label, path in paths.items()
    }
    dense = resampled[files[0].label]
    return RetrievalScores(
        n_queries=retrieval.n_queries,
        n_passages=retrieval.n_passages,
        files={
            label: FileRetrieval(
                scores={metric: found.score(metric) for metric in retrieval.metrics},
                intervals={metric: found.interval(metric) for metric in retrieval.metrics},
                of_dense={} if found is dense else {name: found.beside(dense, name) for name in retrieval.metrics},
            )
            for label, found in resampled.items()
        },
    )
