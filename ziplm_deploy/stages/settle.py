"""How far the table's promise is off, found on drafts of the plans, before anything is searched or refitted.

Latency does not depend on weights. A plan that measured sensitivities give at once is about as fast as the one that a
search finds for the same budget, and so is one for a gradual run's later, better trained parents; so is what the table
promises too much for it. The files of all targets are timed together, and every search then gets the budget that
reaches its target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.latency.benchmark import STEERING_PROCESSES, TimedFile, compare, quiet
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.machine.scratch import scratch_root
from ziplm_deploy.pruning.methods import get_method
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.run.manifest import Correction, Settled, Settling
from ziplm_deploy.run.member import DENSE, PrunedMember
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.benchmark import READ_FIELDS
from ziplm_deploy.stages.export import export_dense, export_key, export_to_be_timed
from ziplm_deploy.stages.prune import MARGIN, is_reachable, member_key, pruned_key, start_from_last_bias
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import dense_file

SLACK = 2.0  # times the tolerance: a draft aims, and the closed loop measures what came of it


def settles(recipe: Recipe) -> bool:
    """Whether drafts are worth timing: a plan takes a search, and the engine is not one that a file may end."""
    searched = get_method(recipe.prune.method).searches and recipe.benchmark.max_corrections > 0
    return searched and not get_engine(recipe.environment.engine).may_abort


def settle(run: Run, generation: Generation) -> None:
    """Set what the table must promise for every target of a generation, unless it was settled or corrected before."""
    open_ones = _open_ones(run, generation)
    if settles(run.recipe) and open_ones:
        drafted = open_ones if len(run.generations) == 1 else run.pruned_members
        export_dense(run)
        settling = measured_drafts(run, drafted)
        for member in open_ones:
            _aim(run, member, settling.drafts.get(member.name))
    if _open_ones(run, generation):
        start_from_last_bias(run, generation)


def _open_ones(run: Run, generation: Generation) -> list[PrunedMember]:
    """Members for which nothing else than their target was aimed at."""
    return [
        member for member in generation.members if run.folder.correction(member.name, member_key(run, member)) is None
    ]


def measured_drafts(run: Run, members: Sequence[PrunedMember]) -> Settling:
    """What the table promises and what is measured for drafts of these members, pruned from the dense model."""
    path = run.folder.settling
    keys = {member.name: _draft_key(run, member) for member in members}

    def work() -> None:
        known = Settling.load(path).drafts if path.exists() else {}
        missing = [
            member for member in members if member.name not in known or known[member.name].key != keys[member.name]
        ]
        found = _time_drafts(run, missing)
        new = {member.name: Settled(key=keys[member.name], **found.get(member.name, {})) for member in missing}
        Settling(drafts={**known, **new}).save(path)

    run.folder.make("settle", content_key(drafts=keys), [path], work)
    return Settling.load(path)


def _draft_key(run: Run, member: PrunedMember) -> str:
    """Everything that a draft and its timing depend on."""
    recipe, treatment = run.recipe, target_treatment(run.recipe)
    return content_key(
        pruned=pruned_key(run, run.dense_member, member.target),
        export=export_key(run, run.dense.hash),
        form="" if treatment is None else treatment.description,
        environment=recipe.environment.fingerprint,
        benchmark=recipe.benchmark.model_dump(include=READ_FIELDS),
        engines=run.engine_versions,
        machine=machine_info().fingerprint,
    )


def _time_drafts(run: Run, members: Sequence[PrunedMember]) -> dict[str, dict[str, float]]:
    """Promised and measured speedups by name; none of a target out of reach, nor of any if the machine is too noisy."""
    files, promised = {DENSE: dense_file(run)}, {}
    planner, progress = run.parent(run.dense_member).planner, run.progress
    tolerance = SLACK * run.recipe.benchmark.tolerance
    with tempfile.TemporaryDirectory(prefix="drafts-", dir=scratch_root()) as folder:
        for member in members:
            try:
                plan = planner.draft(member.target, member.target, progress.step)
            except TargetUnreachableError:
                continue
            path = Path(folder) / f"{member.name}{member.as_exported.path.suffix}"
            export_to_be_timed(run, planner.resized(plan.sizes), path, f"{member.name}, for timing")
            files[member.name] = TimedFile(path, run.recipe.environment.engine)
            promised[member.name] = plan.predicted_speedup
        if not promised:
            return {}
        record = compare(
            files,
            run.recipe.environment,
            run.recipe.benchmark,
            DENSE,
            progress.step,
            decided=lambda ratios: quiet(ratios, tolerance),
            earliest=STEERING_PROCESSES,
            note=progress.note,
        )
    if record.itself.floor > tolerance:
        progress.note(f"drafts settle nothing: the dense model differs from itself by {record.itself.floor_text}")
        return {}
    return {name: {"promised": promised[name], "measured": record.variant(name).speedup} for name in promised}


def _aim(run: Run, member: PrunedMember, draft: Settled | None) -> None:
    """Aim at what the table promises for a model that measures the target, by the draft's ratio of the two."""
    if draft is None or draft.measured is None or draft.promised is None:
        return
    aim = member.target * MARGIN * draft.promised / draft.measured
    if not is_reachable(run, member, aim):
        return
    run.folder.set_correction(member.name, member_key(run, member), Correction(aim, settled=True))
    run.progress.note(
        f"{member.name}: a draft promised {draft.promised:.2f}x and measured {draft.measured:.2f}x; the search aims at "
        f"{aim:.2f}x"
    )


STAGE = Stage(
    "settle",
    lambda run, generation: f"what the table has to promise for {generation.names}",
    settle,
    shown=settles,
)
