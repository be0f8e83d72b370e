"""Intervals of all scores, from what the files did on every evaluation example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.gguf import GgufFile
from ziplm_deploy.run.member import ModelFile
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.quantize import int8_record
from ziplm_deploy.tasks.outcomes import Outcomes, halves
from ziplm_deploy.tasks.record import Scores
from ziplm_deploy.tasks.resampling import N_RESAMPLES, Comparison, ResampledScores
from ziplm_deploy.tasks.uncertainty import FileUncertainty, Uncertainty

ScoredFile = ModelFile | GgufFile


@dataclass(frozen=True)
class _Scored:
    """A file that was evaluated on the examples of this run."""

    file: ScoredFile
    outcomes_hash: str
    resampled: ResampledScores


def estimate_uncertainty(run: Run, files: Sequence[ScoredFile]) -> None:
    """Write the intervals of these files' scores, and how the scores compare with each other."""
    path, task = run.folder.uncertainty, run.task
    hashes = {str(file.path.relative_to(run.folder.path)): Scores.load(file.scores).outcomes_hash for file in files}
    key = content_key(
        outcomes=hashes,
        metrics=list(task.metrics),
        primary=task.metric_name,
        seed=run.recipe.seed,
        chosen=[file.label for file in files if was_chosen(file)],
    )
    run.folder.make("uncertainty", key, [path], lambda: _estimate(run, files).save(path))


def uncertainty_of(run: Run) -> Uncertainty | None:
    """What the last evaluation left; None before there was one that kept outcomes."""
    if run.recipe.data.evaluation is None or not run.folder.uncertainty.exists():
        return None
    return Uncertainty.load(run.folder.uncertainty)


def uncertainty_of_file(run: Run, file: ScoredFile) -> FileUncertainty | None:
    """Intervals of a file's scores as they are now; None where they are of others, or of none."""
    found = None if (known := uncertainty_of(run)) is None else known.files.get(file.label)
    if found is None or not file.scores.exists():
        return None
    return found if found.outcomes_hash == Scores.load(file.scores).outcomes_hash else None


def _estimate(run: Run, files: Sequence[ScoredFile]) -> Uncertainty:
    scored: dict[ScoredFile, _Scored] = {file: found for file in files if (found := _scored(run, file)) is not None}
    dense = scored.get(run.dense_member.as_exported)
    return Uncertainty(
        n_resamples=N_RESAMPLES,
        files={
            file.label: _of_file(run, found, dense, scored.get(_source(file)))
            for file, found in scored.items()
            if not _is_before_training(file)
        },
        training=_of_training(run, scored),
    )


def _is_before_training(file: ScoredFile) -> bool:
    return isinstance(file, ModelFile) and file.is_before_training


def _scored(run: Run, file: ScoredFile) -> _Scored | None:
    scores = Scores.load(file.scores)
    if scores.outcomes_hash is None or scores.examples != run.data.evaluation_rows_key:
        return None
    outcomes = Outcomes.load(file.outcomes, scores.outcomes_hash)
    return _Scored(file, scores.outcomes_hash, ResampledScores(run.task, outcomes, run.recipe.seed))


def _of_file(run: Run, found: _Scored, dense: _Scored | None, source: _Scored | None) -> FileUncertainty:
    metrics, of_dense = run.task.metrics, {}
    if dense is not None and dense is not found:
        unseen = unseen_by_choice(run, found.file, found.resampled.n_examples)
        own, other = (each.resampled.on(unseen) for each in (found, dense))
        of_dense = {metric: own.beside(other, metric) for metric in metrics}
    return FileUncertainty(
        outcomes_hash=found.outcomes_hash,
        intervals={metric: found.resampled.interval(metric) for metric in metrics},
        of_dense=of_dense,
        of_source=None if source is None else _beside_source(run, found, source),
    )


def unseen_by_choice(run: Run, file: ScoredFile, n_examples: int) -> npt.NDArray[np.int64] | None:
    """Examples that did not choose the form of an INT8 file; None where nothing was chosen by its score.

    ``n_examples``: that have outcomes; they may be fewer than rows, such as the queries of a reranker.
    """
    return halves(n_examples, run.recipe.seed)[1] if was_chosen(file) else None


def was_chosen(file: ScoredFile) -> bool:
    """Whether a file's form was taken because of its score, be it the first that was tried."""
    record = int8_record(file) if isinstance(file, ModelFile) else None
    return record is not None and record.n_choosing is not None


def _source(file: ScoredFile) -> ModelFile:
    """The float32 file that an INT8 or GGUF file was made from; others are their own."""
    if isinstance(file, ModelFile) and file.variant.is_sparse:
        return file.member.file(Variant.SPARSE)
    return file.member.as_exported


def _beside_source(run: Run, found: _Scored, source: _Scored) -> Comparison | None:
    """A file beside its source; an INT8 file on the examples that its linears in float32 were not chosen by."""
    if isinstance(found.file, GgufFile):
        return found.resampled.beside(source.resampled, run.task.metric_name)
    if not found.file.variant.is_int8:
        return None
    _, reported = halves(found.resampled.n_examples, run.recipe.seed)
    return found.resampled.on(reported).beside(source.resampled.on(reported), run.task.metric_name)


def _of_training(run: Run, scored: dict[ScoredFile, _Scored]) -> dict[str, Comparison]:
    pairs = {file.member.name: (file.member.as_exported, file) for file in scored if _is_before_training(file)}
    return {
        name: scored[trained].resampled.beside(scored[pruned].resampled, run.task.metric_name)
        for name, (trained, pruned) in pairs.items()
        if trained in scored
    }
