"""Measure, correct, solve again: a target is reached when its file is, not when the table says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ziplm_deploy.compression.records import spared_from_int8
from ziplm_deploy.errors import EngineError, TargetUnreachableError
from ziplm_deploy.latency.benchmark import STEERING_PROCESSES
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.latency.verdict import keeps, outcome, settled_for
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import BenchmarkConfig
from ziplm_deploy.run.manifest import Correction
from ziplm_deploy.run.member import PrunedMember
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.benchmark import is_measured_again, measure, measure_again
from ziplm_deploy.stages.export import export_pruned
from ziplm_deploy.stages.prune import MARGIN, is_reachable, member_key, prune_member
from ziplm_deploy.stages.quantize import int8_record
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import files_of_generation, refused_members, trial_name

MAX_FLOAT32_RESTARTS = 2
ABOVE_REFUSED = 1.01  # aim this much above a plan whose file the engine cannot run
MAX_REFUSED_PLANS = 5


def reach_targets(run: Run, generation: Generation) -> BenchmarkRecord:
    """Benchmark a generation's members; while one misses its target (or overshoots it for no reason), correct it.

    Latency does not depend on weights, so this is done before members are trained. A measurement that leaves open
    whether a member is fast enough corrects nothing; the final one, with other and more processes, judges it.

    Raises:
        EngineError: the engine cannot run a member's file, nor those of plans that are a little faster.
    """
    while True:
        refused = refused_members(run, generation)
        if refused:
            corrected, why = _ask_for_more(run, generation, refused), "because the engine cannot run these files"
        else:
            record = measure_generation(run, generation)
            corrected, why = [m for m in generation.members if correct(run, m, record)], "to be on target"
            if not corrected:
                _note_refused_plans(run, generation)
                return record
        names = ", ".join(member.name for member in corrected)
        run.progress.note(f"solved again with a corrected budget, {why}: {names}")
        for member in corrected:
            prune_member(run, member)
            export_pruned(run, member)


def measure_generation(run: Run, generation: Generation) -> BenchmarkRecord:
    """Timings of a generation's members against the dense model."""
    path, stage = run.folder.generation_benchmark(generation.parent.name), f"benchmark of {generation.parent.name}"
    targets = {member.name: _needed(run, member) for member in generation.members}
    decided = settled_for(targets, run.recipe.benchmark)
    files = files_of_generation(run, generation)
    return measure(run, stage, path, files, decided, earliest=STEERING_PROCESSES)


def _ask_for_more(run: Run, generation: Generation, refused: Mapping[PrunedMember, str]) -> list[PrunedMember]:
    """Ask for slightly faster members than those whose files the engine cannot run, though it ran every block of them.

    Raises:
        EngineError: what the engine said, if nothing is left to try.
    """
    for member, reason in refused.items():
        key = member_key(run, member)
        before = run.folder.correction(member.name, key) or Correction(member.target)
        refused_speedup = PruningPlan.load(member.plan).predicted_speedup
        # above what this plan promises, so that it is another one
        aim = ABOVE_REFUSED * max(before.predicted_target, refused_speedup)
        if before.refused_plans == MAX_REFUSED_PLANS or not is_reachable(run, member, aim):
            run.folder.unmake(trial_name(generation))
            raise EngineError(
                f"{reason}\n{member.name}: this was the last of {before.refused_plans + 1} plans, each a little faster"
            )
        again = replace(
            before, predicted_target=aim, refused_plans=before.refused_plans + 1, refused_speedup=refused_speedup
        )
        run.folder.set_correction(member.name, key, again)
    return list(refused)


def _note_refused_plans(run: Run, generation: Generation) -> None:
    for member in generation.members:
        text = None
        correction = run.folder.correction(member.name, member_key(run, member))
        if correction is not None and correction.refused_plans:
            engine = run.recipe.environment.engine
            text = (
                f"{member.name}: {engine} could not run the first plan's file, so that it was pruned a little further"
            )
        run.folder.set_note("sidesteps", text, member=member.name)


def compensate_float32(run: Run, record: BenchmarkRecord) -> bool:
    """Ask for faster members where linears that stayed in float32 cost the target; False when nothing is left to try.

    How many the accuracy budget keeps is known only after compression, so the loop could not foresee it. Members that
    are trained are left as they are: they would have to be trained again, and all that were pruned from them.
    """
    is_noisy = record.itself.floor > run.recipe.benchmark.tolerance  # that would be what is made up for
    if run.trains or is_noisy or is_measured_again(run):
        return False
    slowed = [member.name for member in run.pruned_members if _compensate_float32(run, member, record)]
    if slowed:
        names = ", ".join(slowed)
        run.progress.note(f"solved again, because linears that stay in float32 cost the target: {names}")
    return bool(slowed)


def reported(run: Run, record: BenchmarkRecord) -> BenchmarkRecord:
    """The benchmark to report: ``record``, or another one where that ended the loop of :func:`compensate_float32`."""
    corrections = (run.folder.correction(member.name, member_key(run, member)) for member in run.pruned_members)
    if is_measured_again(run) or not any(found is not None and found.float32_restarts for found in corrections):
        return record
    run.progress.note("measured once more: the benchmark that a correction was satisfied by is not the one to report")
    return measure_again(run)


def _compensate_float32(run: Run, member: PrunedMember, record: BenchmarkRecord) -> bool:
    file, key = member.file(run.recipe.target), member_key(run, member)
    before = run.folder.correction(member.name, key) or Correction(member.target)
    measured = record.variant(file.label).ratio
    missed = outcome(measured, member.target, run.recipe.benchmark) == "missed"
    if not missed or not spared_from_int8(int8_record(file)) or before.float32_restarts == MAX_FLOAT32_RESTARTS:
        return False
    aim = before.predicted_target * MARGIN * member.target / measured.value
    if not is_reachable(run, member, aim):
        return False
    in_loop = BenchmarkRecord.load(run.folder.generation_benchmark(run.dense_member.name)).variant(member.name).speedup
    again = Correction(
        aim, float32_slowdown=max(1.0, in_loop / measured.value), float32_restarts=before.float32_restarts + 1
    )
    run.folder.set_correction(member.name, key, again)
    return True


def correct(run: Run, member: PrunedMember, record: BenchmarkRecord) -> bool:
    """Set a new predicted target for a member outside its tolerance; False when inside, or nothing is left to try."""
    if record.itself.floor > run.recipe.benchmark.tolerance:
        return False  # noise would be what it corrects
    key = member_key(run, member)
    measured = record.variant(member.name).ratio
    correction = run.folder.correction(member.name, key) or Correction(member.target)
    plan = PruningPlan.load(member.plan)
    wanted = _wanted(run.recipe.benchmark, correction, member.target, measured, plan)
    try:
        if wanted is None or not run.parent_of(member).planner.changes(plan, wanted):
            return False
    except TargetUnreachableError:
        return False
    history = [*correction.history, (correction.predicted_target, measured.value)]
    again = replace(correction, predicted_target=wanted, corrections=correction.corrections + 1, history=history)
    run.folder.set_correction(member.name, key, again)
    return True


def _needed(run: Run, member: PrunedMember) -> float:
    """What a member has to measure before it is trained and compressed so that it reaches its target afterwards."""
    correction = run.folder.correction(member.name, member_key(run, member))
    return member.target * (correction.float32_slowdown if correction else 1.0)


def _wanted(
    settings: BenchmarkConfig, correction: Correction, target: float, measured: Ratio, plan: PruningPlan
) -> float | None:
    """What the table must predict for the next plan; None: the measured one stays."""
    needed = target * correction.float32_slowdown
    if keeps(measured, needed, settings) is not False:
        return None
    aim = correction.predicted_target
    if correction.corrections < settings.max_corrections:
        # what the table promised for this plan against what was measured, applied to the target
        promised = needed * MARGIN * plan.predicted_speedup / measured.value
        return max(promised, correction.refused_speedup * ABOVE_REFUSED)
    if correction.corrections == settings.max_corrections and measured.value < needed:
        # the last correction missed; an earlier, faster member may still be had
        best = _best_aim([*correction.history, (aim, measured.value)], needed, settings.tolerance)
        return None if best == aim else best
    return None


def _best_aim(history: list[tuple[float, float]], target: float, tolerance: float) -> float | None:
    """The aim whose member was fast enough with the least to spare."""
    fast_enough = [(measured, aim) for aim, measured in history if measured >= target * (1 - tolerance)]
    return min(fast_enough)[1] if fast_enough else None


STAGE = Stage("benchmark", lambda run, generation: "the dense model and the pruned ones, interleaved", reach_targets)
