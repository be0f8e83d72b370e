"""Measure, correct, solve again: a target is reached when its ONNX file is, not when the table says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ziplm_deploy.compression.records import int8_record, kept_in_float32
from ziplm_deploy.errors import EngineError, TargetUnreachableError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import file_label
from ziplm_deploy.run.correction import Correction
from ziplm_deploy.run.run import Run, Step
from ziplm_deploy.stages.export import export_pruned, member_key, prune_member
from ziplm_deploy.stages.timed_files import refused_targets, trial_name

MARGIN = 1.005  # aim this much above the target when correcting, so that noise does not undo the correction


MAX_FLOAT32_RESTARTS = 2


ABOVE_REFUSED = 1.01  # aim this much above a plan whose file the engine cannot run


MAX_REFUSED_PLANS = 5


def reach_targets(state: Run, step: Step, measure: Callable[[], BenchmarkRecord]) -> BenchmarkRecord:
    """Benchmark the members of a step; while one misses its target (or overshoots it for no reason), correct it.

    Latency does not depend on weights, so this is done before members are trained; half of the tolerance is then
    left for the final measurement.

    Raises:
        EngineError: the engine cannot run a member's file, nor those of plans that are a little faster.
    """
    while True:
        refused = refused_targets(state, step)
        if refused:
            corrected, why = _sidestep(state, step, refused), "because the engine cannot run these files"
        else:
            record = measure()
            corrected, why = [target for target in step.targets if _correct(state, target, record)], "to be on target"
            if not corrected:
                _note_sidesteps(state, step)
                return record
        names = ", ".join(map(state.member_name, corrected))
        state.progress.note(f"solved again with a corrected budget, {why}: {names}")
        for target in corrected:
            name = state.member_name(target)
            prune_member(state, target)
            export_pruned(state, name)


def _sidestep(state: Run, step: Step, refused: Mapping[float, str]) -> list[float]:
    """Ask for slightly faster members than those whose files the engine cannot run, though it ran every block of them.

    Raises:
        EngineError: what the engine said, if nothing is left to try.
    """
    for target, reason in refused.items():
        name, key = state.member_name(target), member_key(state, target)
        before = state.folder.correction(name, key) or Correction(target)
        floor = PruningPlan.load(state.folder.plan(name)).predicted_speedup
        aim = ABOVE_REFUSED * max(
            before.predicted_target, floor
        )  # above what this plan promises, so that it is another one
        if before.sidesteps == MAX_REFUSED_PLANS or not _fits(state, target, aim):
            state.folder.forget(trial_name(step))
            raise EngineError(
                f"{reason}\n{name}: this was the last of {before.sidesteps + 1} plans, each a little faster"
            )
        again = replace(before, predicted_target=aim, sidesteps=before.sidesteps + 1, floor=floor)
        state.folder.set_correction(name, key, again)
    return list(refused)


def _note_sidesteps(state: Run, step: Step) -> None:
    for target in step.targets:
        name, text = state.member_name(target), None
        correction = state.folder.correction(name, member_key(state, target))
        if correction is not None and correction.sidesteps:
            engine = state.recipe.environment.engine
            text = f"{name}: {engine} could not run the first plan's file, so that it was pruned a little further"
        state.folder.set_note(f"sidesteps of {name}", text)


def start_from_last_bias(state: Run, step: Step) -> None:
    """Let a gradual step begin with what the one before has shown: how far the table's promise was off."""
    position = state.steps.index(step)
    if position == 0:
        return
    before = state.steps[position - 1]
    record = BenchmarkRecord.load(state.folder.step_benchmark(before.parent))
    name_before = state.member_name(before.targets[-1])
    plan = PruningPlan.load(state.folder.plan(name_before))
    bias = plan.predicted_speedup / record.variant(name_before).speedup
    for target in step.targets:
        name, key = state.member_name(target), member_key(state, target)
        if bias > MARGIN and state.folder.correction(name, key) is None and _fits(state, target, target * bias):
            state.folder.set_correction(name, key, Correction(target * bias))


def compensate_float32(state: Run, record: BenchmarkRecord) -> bool:
    """Ask for faster members where linears that stayed in float32 cost the target; False when nothing is left to try.

    How many the accuracy budget keeps is known only after compression, so the loop could not foresee it. Members that
    are trained are left as they are: they would have to be trained again, and all that were pruned from them.
    """
    if state.trains:
        return False
    slowed = [target for target in state.recipe.speedups if _compensate_float32(state, target, record)]
    if slowed:
        names = ", ".join(map(state.member_name, slowed))
        state.progress.note(f"solved again, because linears that stay in float32 cost the target: {names}")
    return bool(slowed)


def _compensate_float32(state: Run, target: float, record: BenchmarkRecord) -> bool:
    settings, variant = state.recipe.benchmark, state.recipe.compress.target
    name, key = state.member_name(target), member_key(state, target)
    before = state.folder.correction(name, key) or Correction(target)
    measured = record.variant(file_label(name, variant)).speedup
    kept = kept_in_float32(int8_record(state, name, variant))
    if not kept or measured >= target * (1 - settings.tolerance) or before.rooms == MAX_FLOAT32_RESTARTS:
        return False
    aim = before.predicted_target * MARGIN * target / measured
    if not _fits(state, target, aim):
        return False
    without = BenchmarkRecord.load(state.folder.step_benchmark(DENSE)).variant(name).speedup
    state.folder.set_correction(
        name, key, Correction(aim, slowdown=max(1.0, without / measured), rooms=before.rooms + 1)
    )
    return True


def _fits(state: Run, target: float, aim: float) -> bool:
    try:
        state.parent_of(target).planner.budget_ms(aim)
    except TargetUnreachableError:
        return False
    return True


def _best_aim(history: list[tuple[float, float]], target: float, tolerance: float) -> float | None:
    """The aim whose member was fast enough with the least to spare."""
    fast_enough = [(measured, aim) for aim, measured in history if measured >= target * (1 - tolerance)]
    return min(fast_enough)[1] if fast_enough else None


def _correct(state: Run, target: float, record: BenchmarkRecord) -> bool:
    """Set a new predicted target for a member outside its tolerance; False when inside, or nothing is left to try."""
    settings = state.recipe.benchmark
    tolerance = settings.tolerance / 2 if state.recipe.finishes_after_pruning else settings.tolerance
    name, key = state.member_name(target), member_key(state, target)
    measured = record.variant(name).speedup
    correction = state.folder.correction(name, key) or Correction(predicted_target=target)
    needed = target * correction.slowdown
    if needed * (1 - tolerance) <= measured <= needed * (1 + settings.overshoot):
        return False
    plan = PruningPlan.load(state.folder.plan(name))
    aim = correction.predicted_target
    history = [*correction.history, (aim, measured)]
    if correction.count < settings.max_corrections:
        # what the table promised for this plan against what was measured, applied to the target
        wanted = max(needed * MARGIN * plan.predicted_speedup / measured, correction.floor * ABOVE_REFUSED)
    elif correction.count == settings.max_corrections and measured < needed:
        # the last correction missed; an earlier, faster member may still be had
        best = _best_aim(history, needed, tolerance)
        if best is None or best == aim:
            return False
        wanted = best
    else:
        return False
    try:
        if not state.parent_of(target).planner.changes(plan, wanted):
            return False
    except TargetUnreachableError:
        return False
    again = replace(correction, predicted_target=wanted, count=correction.count + 1, history=history)
    state.folder.set_correction(name, key, again)
    return True
