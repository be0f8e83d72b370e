"""Scores of baselines beside those of the dense model and of the family's files, on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.baselines import BaselineScores
from ziplm_deploy.machine import distributed
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.baseline import BaselineFiles
from ziplm_deploy.run.member import ModelFile
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.baselines import made_baselines
from ziplm_deploy.stages.uncertainty import unseen_by_choice, was_chosen
from ziplm_deploy.tasks.outcomes import Outcomes
from ziplm_deploy.tasks.record import Scores
from ziplm_deploy.tasks.resampling import ResampledScores
from ziplm_deploy.tasks.uncertainty import FileUncertainty

Scored = ModelFile | BaselineFiles


def scored_as(run: Run, baseline: BaselineFiles) -> Scored:
    """Whose scores a baseline has: the dense model's where it answers as that does."""
    return run.dense_member.file(Variant.FP32) if baseline.page.answers_as_dense else baseline


def compare_with_baselines(run: Run, files: Sequence[ModelFile]) -> None:
    """Write how surely each baseline scores higher or lower than each of these files, and than the dense model."""
    path = _path(run)
    made = {each.name: scored_as(run, each) for each in made_baselines(run)}
    baselines = {name: file for name, file in made.items() if file.scores.exists()}  # its engine may have failed
    if not baselines:
        if distributed.is_first():
            path.unlink(missing_ok=True)
        return
    members = {file.label: file for file in files if not file.is_before_training}
    key = content_key(
        outcomes=[{name: _outcomes_hash(file) for name, file in each.items()} for each in (members, baselines)],
        metrics=list(run.task.metrics),
        primary=run.task.metric_name,
        seed=run.recipe.seed,
        chosen=[label for label, file in members.items() if was_chosen(file)],
    )
    run.folder.make("compare with baselines", key, [path], lambda: _compare(run, members, baselines).save(path))


def baseline_scores(run: Run) -> BaselineScores:
    """What :func:`compare_with_baselines` left; empty without an evaluation."""
    path = _path(run)
    if run.recipe.data.evaluation is None or not path.exists():
        return BaselineScores(baselines={}, gains={})
    return BaselineScores.load(path)


def _path(run: Run) -> Path:
    path: Path = run.folder.path / "baselines" / "scores.json"
    return path


def _outcomes_hash(file: Scored) -> str | None:
    return Scores.load(file.scores).outcomes_hash


def _compare(run: Run, members: Mapping[str, ModelFile], baselines: Mapping[str, Scored]) -> BaselineScores:
    dense_file, metric = run.dense_member.file(Variant.FP32), run.task.metric_name
    dense = _resampled(run, dense_file)
    rivals = {name: found for name, file in baselines.items() if (found := _resampled(run, file)) is not None}
    uncertainty, gains = {}, {}
    for name, rival in rivals.items():
        reference = None if baselines[name] == dense_file else dense
        uncertainty[name] = FileUncertainty(
            outcomes_hash=_outcomes_hash(baselines[name]) or "",
            intervals={each: rival.interval(each) for each in run.task.metrics},
            of_dense={} if reference is None else {each: rival.beside(reference, each) for each in run.task.metrics},
        )
    for label, file in members.items():
        own = None if file == dense_file else _resampled(run, file)
        if own is not None:
            examples = unseen_by_choice(run, file, own.n_examples)
            own = own.on(examples)
            gains[label] = {name: rival.on(examples).beside(own, metric) for name, rival in rivals.items()}
    return BaselineScores(baselines=uncertainty, gains=gains)


def _resampled(run: Run, file: Scored) -> ResampledScores | None:
    """Resampled scores of a file; None for one that was not scored on the examples of this run."""
    scores = Scores.load(file.scores)
    if scores.outcomes_hash is None or scores.examples != run.data.evaluation_rows_key:
        return None
    return ResampledScores(run.task, Outcomes.load(file.outcomes, scores.outcomes_hash), run.recipe.seed)
