"""Measure, correct, solve again: a target is reached when its ONNX file is, not when the table says so."""

from __future__ import annotations

from collections.abc import Callable

from ziplm_deploy.artifacts import BenchmarkRecord, PruningPlan
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.members import export_pruned, member_key, prune_member
from ziplm_deploy.run import Run, Step
from ziplm_deploy.run_folder import Correction

MARGIN = 1.005  # aim this much above the target when correcting, so that noise does not undo the correction


def reach_targets(state: Run, step: Step, measure: Callable[[], BenchmarkRecord]) -> BenchmarkRecord:
    """Benchmark the members of a step; while one misses its target (or overshoots it for no reason), correct it.

    Latency does not depend on weights, so this is done before members are trained; half of the tolerance is then
    left for the final measurement.
    """
    while True:
        record = measure()
        corrected = [target for target in step.targets if _correct(state, target, record)]
        if not corrected:
            return record
        names = ", ".join(map(state.member_name, corrected))
        state.progress.note(f"solved again with a corrected budget: {names}")
        for target in corrected:
            name = state.member_name(target)
            prune_member(state, target)
            export_pruned(state, name)


def carry_over(state: Run, step: Step) -> None:
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
    if target * (1 - tolerance) <= measured <= target * (1 + settings.overshoot):
        return False
    plan = PruningPlan.load(state.folder.plan(name))
    aim = correction.predicted_target
    history = [*correction.history, (aim, measured)]
    if correction.count < settings.max_corrections:
        # what the table promised for this plan against what was measured, applied to the target
        wanted = target * MARGIN * plan.predicted_speedup / measured
    elif correction.count == settings.max_corrections and measured < target:
        # the last correction missed; an earlier, faster member may still be had
        best = _best_aim(history, target, tolerance)
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
    state.folder.set_correction(name, key, Correction(wanted, correction.count + 1, history))
    return True
