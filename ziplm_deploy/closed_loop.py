"""Measure, correct, solve again: a target is reached when its ONNX file is, not when the table says so."""

from __future__ import annotations

from collections.abc import Callable

from ziplm_deploy.artifacts import BenchmarkRecord, PruningPlan
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.members import export_member, member_key, prune_member
from ziplm_deploy.run import Run

MARGIN = 1.005  # aim this much above the target when correcting, so that noise does not undo the correction


def reach_targets(state: Run, measure: Callable[[Run], BenchmarkRecord]) -> BenchmarkRecord:
    """Benchmark all members; while one misses its target (or overshoots it for no reason), correct it and repeat."""
    while True:
        record = measure(state)
        corrected = [target for target in state.recipe.speedups if _correct(state, target, record)]
        if not corrected:
            return record
        names = ", ".join(map(state.member_name, corrected))
        state.progress.note(f"solved again with a corrected budget: {names}")
        for target in corrected:
            prune_member(state, target)
            export_member(state, state.member_name(target))


def _correct(state: Run, target: float, record: BenchmarkRecord) -> bool:
    """Set a new predicted target for a member outside its tolerance; False when inside, or nothing is left to try."""
    settings = state.recipe.benchmark
    name = state.member_name(target)
    measured = record.variant(name).speedup
    if target * (1 - settings.tolerance) <= measured <= target * (1 + settings.overshoot):
        return False
    plan = PruningPlan.load(state.folder.plan(name))
    key = member_key(state, target)
    correction = state.folder.correction(name, key)
    count = correction[1] if correction else 0
    if count >= settings.max_corrections:
        return False
    # what the table promised for this plan against what was measured, applied to the target
    predicted_target = target * MARGIN * plan.predicted_speedup / measured
    if measured > target and predicted_target >= plan.predicted_speedup:
        return False
    try:
        if not state.planner.changes(plan, predicted_target):
            return False
    except TargetUnreachableError:
        return False
    state.folder.set_correction(name, key, predicted_target, count + 1)
    return True
