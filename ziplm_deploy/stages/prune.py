"""A plan and a physically smaller model for every target."""

from __future__ import annotations

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.models.member_files import replace_member
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.run.manifest import Correction
from ziplm_deploy.run.member import Member, PrunedMember
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.calibrate import database_key
from ziplm_deploy.stages.stage import Stage

MARGIN = 1.005  # aim this much above the target when correcting, so that noise does not undo the correction


def prune(run: Run, generation: Generation) -> None:
    """Members of a generation as the latency table promises them, or as the closed loop corrected them before."""
    for member in generation.members:
        prune_member(run, member)


def member_key(run: Run, member: PrunedMember) -> str:
    """Everything that a pruned member depends on, but for the closed loop's correction."""
    return pruned_key(run, run.generation_of(member).parent, member.target)


def pruned_key(run: Run, parent: Member, target: float) -> str:
    """Everything that a plan for a target depends on, with the model that it prunes."""
    recipe = run.recipe
    return content_key(
        database=database_key(run, parent, run.parent(parent)),
        table=run.table.fingerprint,
        prune=recipe.prune.model_dump(exclude={"memory_limit_gb"}),
        seed=recipe.seed,
        target=target,
    )


def prune_member(run: Run, member: PrunedMember) -> None:
    """Plan and checkpoint of one member; as corrected by the closed loop, if it was before."""
    target, key = member.target, member_key(run, member)
    correction = run.folder.correction(member.name, key)
    predicted_target = correction.predicted_target if correction else target

    def work() -> None:
        planner = run.parent_of(member).planner
        solved_before = correction is not None and correction.corrections > 0 and member.plan.exists()
        previous = PruningPlan.load(member.plan).sizes if solved_before else None
        plan = planner.plan(target, predicted_target, previous, run.progress.step)
        model, unsolved = planner.build(plan, run.progress.step)
        replace_member(member.pruned_folder, model, run.dense.processor, run.recipe.model, {"member": member.name})
        exchanged = planner.exchanged_fraction(plan, model)
        plan.model_copy(update={"exchanged_fraction": exchanged}).save(member.plan)
        left = f"{member.name}: not refitted, as their inputs hardly vary: {', '.join(unsolved)}" if unsolved else None
        run.folder.set_note("refit", left, member=member.name)
        speedup = f"{plan.predicted_speedup:.2f}x"
        run.progress.note(f"{member.name}: predicted {speedup} after {plan.evaluations} evaluated plans")
        if exchanged is not None:
            text = "of the structures kept in order are others than the database holds"
            run.progress.note(f"{member.name}: {exchanged:.0%} {text}")

    # Without training a member is pruned in its own folder, where a trained one may lie from before.
    full_key = content_key(key=key, predicted_target=predicted_target, trained_later=run.trains)
    run.folder.make(f"prune {member.name}", full_key, [member.plan, member.pruned_weights, member.pruned_folder], work)


def start_from_last_bias(run: Run, generation: Generation) -> None:
    """Let a gradual generation begin with what the one before has shown: how far the table's promise was off."""
    position = run.generations.index(generation)
    if position == 0:
        return
    before = run.generations[position - 1]
    record = BenchmarkRecord.load(run.folder.generation_benchmark(before.parent.name))
    if record.itself.floor > run.recipe.benchmark.tolerance:
        return  # noise would be what it begins with
    last = before.members[-1]
    bias = PruningPlan.load(last.plan).predicted_speedup / record.variant(last.name).speedup
    for member in generation.members:
        key, aim = member_key(run, member), member.target * bias
        if bias > MARGIN and run.folder.correction(member.name, key) is None and is_reachable(run, member, aim):
            run.folder.set_correction(member.name, key, Correction(aim))


def is_reachable(run: Run, member: PrunedMember, aim: float) -> bool:
    """Whether some plan of a member's parent is predicted to be so fast."""
    try:
        run.parent_of(member).planner.budget_ms(aim)
    except TargetUnreachableError:
        return False
    return True


STAGE = Stage("prune", lambda run, generation: f"plans for {generation.names}", prune)
