"""How far the table's promise is off, found on drafts of the plans, before anything is searched or refitted.

Latency does not depend on weights. A plan that measured sensitivities give at once is about as fast as the one that a
search finds for the same budget; so is what the table promises too much for it. Its file is timed, and the search then
gets the budget that reaches the target.
"""

from __future__ import annotations

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.engines import get_engine
from ziplm_deploy.latency.benchmark import TimedFile
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.pruning.methods import get_method
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.run.manifest import Correction
from ziplm_deploy.run.member import DENSE, PrunedMember
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.benchmark import measure
from ziplm_deploy.stages.export import export_dense, export_key, export_to_be_timed
from ziplm_deploy.stages.prune import MARGIN, is_reachable, member_key, start_from_last_bias
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import dense_file


def settles(recipe: Recipe) -> bool:
    """Whether drafts are worth timing: a plan takes a search, and the engine is not one that a file may end."""
    searched = get_method(recipe.prune.method).searches and recipe.benchmark.max_corrections > 0
    return searched and not get_engine(recipe.environment.engine).may_abort


def settle(run: Run, generation: Generation) -> None:
    """Set what the table must promise for every target of a generation, unless it was settled or corrected before.

    A later generation of a gradual run goes by what the one before it has measured, and needs no draft.
    """
    start_from_last_bias(run, generation)
    if not settles(run.recipe) or run.generations.index(generation) > 0:
        return
    members = [member for member in generation.members if _is_open(run, member)]
    if not members:
        return
    export_dense(run)
    files = {DENSE: dense_file(run)}
    for member in members:
        _draft(run, member)
        files[member.name] = TimedFile(member.draft.with_suffix(".onnx"), run.recipe.environment.engine)
    parent = generation.parent.name
    record = measure(run, f"settle {parent}", run.folder.settling(parent), files, decided=lambda ratios: True)
    for member in members:
        _aim(run, member, record)
        member.draft.with_suffix(".onnx").unlink(missing_ok=True)


def _is_open(run: Run, member: PrunedMember) -> bool:
    found = run.folder.correction(member.name, member_key(run, member)) or Correction(member.target)
    begun = found.settled or found.corrections or found.refused_plans or found.float32_restarts
    return not begun and is_reachable(run, member, found.predicted_target)


def _draft(run: Run, member: PrunedMember) -> None:
    """Plan and file of a member as it would be without a search."""
    key = member_key(run, member)
    correction = run.folder.correction(member.name, key)
    aim = correction.predicted_target if correction else member.target
    path, treatment = member.draft.with_suffix(".onnx"), target_treatment(run.recipe)
    form = "" if treatment is None else treatment.description
    full_key = content_key(key=key, predicted_target=aim, export=export_key(run, ""), form=form)

    def work() -> None:
        planner = run.parent_of(member).planner
        plan = planner.draft(member.target, aim, run.progress.step)
        plan.save(member.draft)
        export_to_be_timed(run, planner.resized(plan.sizes), path, f"{member.name}, for timing")

    run.folder.make(f"draft {member.name}", full_key, [member.draft, path], work)


def _aim(run: Run, member: PrunedMember, record: BenchmarkRecord) -> None:
    """Aim at what the table promises for a model that measures the target, by the draft's ratio of the two."""
    key, draft = member_key(run, member), PruningPlan.load(member.draft)
    before = run.folder.correction(member.name, key) or Correction(member.target)
    promised = member.target * MARGIN * draft.predicted_speedup / record.variant(member.name).speedup
    trusted = record.itself.floor <= run.recipe.benchmark.tolerance and is_reachable(run, member, promised)
    aim = promised if trusted else before.predicted_target
    run.folder.set_correction(member.name, key, Correction(aim, settled=True))
    measured = f"measured {record.variant(member.name).speedup:.2f}x"
    run.progress.note(
        f"{member.name}: a draft promised {draft.predicted_speedup:.2f}x and {measured}; the search aims at {aim:.2f}x"
    )


STAGE = Stage(
    "settle",
    lambda run, generation: f"what the table has to promise for {generation.names}",
    settle,
    shown=settles,
)
