"""Collect what the stages left in a run folder into one report."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.compression.records import int8_notes, int8_record, kept_in_float32
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.machine import distributed
from ziplm_deploy.machine.info import versions
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import BenchmarkConfig, Variant, file_label
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.files import file_reports, timing_of
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import FamilyReport, FileReport, MemberReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.evaluate import accuracy_in
from ziplm_deploy.stages.export import member_key


def write_report(state: Run) -> FamilyReport:
    """Write ``report.json``, ``report.md`` and ``README.md`` in every member's folder; returns the report.

    Raises:
        CorruptArtifactError: benchmark, plan or weights of a member are missing or damaged.
        StorageError: a file cannot be written.
    """
    report = collect(state)
    if not distributed.is_first():
        return report
    for member in report.members:
        write_text(state.folder.member(member.name) / "README.md", model_card(report, member, state.task.ort_class))
    write_text(state.folder.path / "report.md", family_markdown(report))
    report.save(state.folder.path / "report.json")
    return report


def collect(state: Run) -> FamilyReport:
    """Everything that is known about the members; measures and writes nothing."""
    recipe = state.recipe
    record = BenchmarkRecord.load(state.folder.benchmark)
    baseline = timing_of(record, record.baseline)
    members = [_dense(state, record)]
    members += [_member(state, target, record) for target in recipe.speedups]
    return FamilyReport(
        name=recipe.name,
        model=recipe.model.path,
        task=recipe.model.task,
        metric=state.task.metric_name,
        method=recipe.prune.method,
        recovery=recipe.recover.mode,
        machine=record.machine,
        engine=record.engine,
        engine_version=record.engine_version,
        baseline_engine=baseline.engine,
        baseline_engine_version=baseline.engine_version,
        environment=record.environment,
        members=members,
        aa_ratio=record.aa_ratio,
        aa_low=record.aa_low,
        aa_high=record.aa_high,
        notes=[
            *state.notes,
            *harmed_by_training(members, state.task.metric_name),
            *(note for name in state.names for note in int8_notes(state, name)),
            *filter(None, (get_engine(name).notice for name in dict.fromkeys((record.engine, baseline.engine)))),
        ],
        stage_seconds=state.folder.seconds,
        versions=versions(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def harmed_by_training(members: list[MemberReport], metric: str) -> list[str]:
    """A note for every member whose ``model.onnx`` scored higher before it was trained."""
    notes = []
    for member in members:
        before, after = (scores.get(metric) for scores in (member.accuracy_before_training, member.exported_accuracy))
        if before is not None and after is not None and after < before:
            notes.append(
                f"{member.name}: training lowered {metric} from {before:.4f} to {after:.4f}; try a smaller "
                "recover.learning_rate, or more steps"
            )
    return notes


def judge(
    measured: float, target: float, settings: BenchmarkConfig, corrections: int, largest: float, slowed_by: str = ""
) -> tuple[str, str]:
    """Verdict on a member and, if it is not "reached", the reason.

    ``largest`` is the speedup that the table predicts with every module at its fastest; ``slowed_by`` says what the
    closed loop could not correct, because it happened to the file afterwards.
    """
    if measured < target * (1 - settings.tolerance):
        if target > largest:
            return "missed", f"the largest speedup that the latency table allows is {largest:.2f}x"
        closer = _why_not_closer(settings, corrections, "faster", f" (largest predicted: {largest:.2f}x)")
        return "missed", slowed_by or closer
    if measured > target * (1 + settings.overshoot):
        return "faster than asked", _why_not_closer(settings, corrections, "slower", "")
    return "reached", ""


def _why_not_closer(settings: BenchmarkConfig, corrections: int, wanted: str, detail: str) -> str:
    if settings.max_corrections == 0:
        return f"the recipe allows no corrections (benchmark.max_corrections: 0){detail}"
    if corrections >= settings.max_corrections:
        return f"all {settings.max_corrections} corrections of the closed loop were used{detail}"
    return f"no {wanted} plan fits the corrected budget: the levels are too far apart{detail}"


def parameter_count(path: Path) -> int:
    """Parameters in a safetensors file, from its header.

    Raises:
        CorruptArtifactError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CorruptArtifactError(
            f"expected safetensors weights in {path}, found: {error}; run ziplm-deploy prune again"
        ) from error


def _dense(state: Run, record: BenchmarkRecord) -> MemberReport:
    sizes = _full_sizes(state)
    return _fill(
        state, DENSE, record, Variant.FP32, speedup_target=None, predicted_speedup=None, sizes=sizes, verdict="baseline"
    )


def _full_sizes(state: Run) -> dict[str, int]:
    shape = state.table.shape
    return {
        f"{layer}.{kind}": size
        for layer in range(shape.n_layers)
        for kind, size in (("attention", shape.n_heads), ("ffn", shape.intermediate_size))
    }


def _member(state: Run, target: float, record: BenchmarkRecord) -> MemberReport:
    name, settings = state.member_name(target), state.recipe.benchmark
    plan = PruningPlan.load(state.folder.plan(name))
    correction = state.folder.correction(name, member_key(state, target))
    corrections = correction.count + correction.rooms if correction else 0
    variant = state.recipe.compress.target
    result = timing_of(record, file_label(name, variant))
    slowed_by = kept_in_float32(int8_record(state, name, variant)) or _was_fast_enough(state, target)
    verdict, reason = judge(result.speedup, target, settings, corrections, state.table.largest_speedup(), slowed_by)
    if verdict == "faster than asked" and plan.sizes == _full_sizes(state):
        reason = f"nothing was pruned: the {variant} file is that fast as it is"
    elif verdict == "faster than asked" and correction is not None and correction.sidesteps:
        reason = f"{state.recipe.environment.engine} cannot run the file of a slower plan"
    return _fill(
        state,
        name,
        record,
        variant,
        speedup_target=target,
        predicted_speedup=plan.predicted_speedup,
        sizes=plan.sizes,
        search_loss=plan.search_loss,
        seed_losses=plan.seed_losses,
        corrections=corrections,
        verdict=verdict,
        reason=reason,
    )


def _was_fast_enough(state: Run, target: float) -> str:
    """That the closed loop found a member fast enough before it was trained or compressed; empty if it did not."""
    if not state.recipe.finishes_after_pruning:
        return ""
    parent = next(step.parent for step in state.steps if target in step.targets)
    before = BenchmarkRecord.load(state.folder.step_benchmark(parent)).variant(state.member_name(target)).speedup
    if before < target * (1 - state.recipe.benchmark.tolerance):
        return ""
    return (
        f"it was fast enough ({before:.2f}x) when the closed loop measured it, before it was trained or compressed; "
        "measure again on a quiet machine with ziplm-deploy benchmark, or ask for a little more"
    )


def _fill(state: Run, name: str, record: BenchmarkRecord, variant: Variant, **facts: object) -> MemberReport:
    folder, pruned = state.folder.member(name), state.folder.pruned(name)
    files = file_reports(state, name, record)
    served = next(file for file in files if file.variant == variant)
    shared = set(MemberReport.model_fields) & set(FileReport.model_fields)
    common: dict[str, object] = {
        **served.model_dump(include=shared),
        "name": name,
        "folder": name,
        "parameters": parameter_count(folder / "pruned.safetensors"),
        "files": files,
    }
    if state.trains and name != DENSE:
        common["accuracy_before_training"] = accuracy_in(state, pruned)
        common["training"] = TrainingRecord.load(folder / "training.json")
    common.update(facts)  # the verdict on the target has a reason of its own
    return MemberReport.model_validate(common)
