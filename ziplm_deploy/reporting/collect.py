"""From the facts of a run to its report; measures and writes nothing."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from ziplm_deploy.compression.records import facts_of, int8_note, spared_from_int8
from ziplm_deploy.engines import get_engine
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord, FileTiming
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import versions
from ziplm_deploy.models.shape import ModuleId, ModuleKind
from ziplm_deploy.recipe import Variant
from ziplm_deploy.reporting.baselines import TRAINED_ON, baseline_report, beside_baselines, over_torch
from ziplm_deploy.reporting.facts import FamilyFacts, FileFacts, MemberFacts
from ziplm_deploy.reporting.gguf import gguf_reports
from ziplm_deploy.reporting.judge import (
    budget_decision,
    harmed_by_training,
    judge,
    judged_apart,
    nothing_to_keep,
    taught_more_than_dense,
    too_noisy,
    undecided_budget,
    was_fast_enough,
    why_not_recommended,
)
from ziplm_deploy.reporting.records import FamilyReport, FileReport, MemberReport, Timed
from ziplm_deploy.reporting.sampled import sampled_text
from ziplm_deploy.reporting.table import not_ahead


def family_report(facts: FamilyFacts) -> FamilyReport:
    """Every member beside the dense model of the same run, judged.

    Raises:
        CorruptArtifactError: a file has no timing in the benchmark.
    """
    recipe, record = facts.recipe, facts.record
    baseline = timing_of(record, record.baseline)
    measured_with = facts.stage_versions.get("benchmark") or versions()
    members = [member_report(facts, member) for member in facts.members]
    return FamilyReport(
        name=recipe.name,
        model=recipe.model.path,
        task=recipe.model.task,
        metric=facts.metric,
        method=recipe.prune.method,
        recovery=recipe.recover.mode,
        machine=record.machine,
        engine=record.engine,
        engine_version=record.engine_version,
        baseline_engine=baseline.engine,
        baseline_engine_version=baseline.engine_version,
        environment=record.environment,
        members=members,
        baselines=[baseline_report(record, each) for each in facts.baselines],
        gguf=gguf_reports(record, facts.gguf),
        plain_pages=Timed(**Timed.figures(facts.plain_pages)) if facts.plain_pages else None,
        aa_ratio=record.aa_ratio,
        aa_low=record.aa_low,
        aa_high=record.aa_high,
        tolerance=facts.recipe.benchmark.tolerance,
        notes=[
            *facts.notes,
            *nothing_to_keep(members, facts.metric),
            *harmed_by_training(members, facts.metric),
            *taught_more_than_dense(recipe.recover, has_control=TRAINED_ON in (each.name for each in facts.baselines)),
            *_int8_notes(facts),
            *_no_huge_pages(record, facts.plain_pages),
            *judged_apart(members, facts.metric),
            *undecided_budget(members, recipe.compress.int8.max_loss),
            *filter(None, (get_engine(name).notice for name in dict.fromkeys((record.engine, baseline.engine)))),
        ],
        stage_seconds=facts.stage_seconds,
        lengths=facts.lengths,
        retrieval=facts.retrieval,
        windows=facts.windows,
        sampled_text=sampled_text(recipe, facts.sampled_texts),
        short_tokens=facts.short.environment.workload.seq_len if facts.short else None,
        short_itself=facts.short.itself if facts.short else None,
        versions=measured_with,
        other_versions=_differing(facts.stage_versions, measured_with),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _no_huge_pages(record: BenchmarkRecord, plain: FileTiming | None) -> list[str]:
    """What to know where huge pages were asked for, and some processes had none."""
    if not record.environment.huge_pages:
        return []
    asked = [timing for timing in record.variants if plain is None or timing.name != plain.name]
    without = [timing.name for timing in asked if timing.huge_page_bytes == 0]
    if not without:
        return []
    return [
        f"environment.huge_pages asked for huge pages, but processes of {', '.join(without)} had none (AnonHugePages "
        "in /proc/PID/smaps_rollup): their memory is in small parts, or the system had none to give; their latencies "
        "are those of plain pages"
    ]


def _differing(stages: Mapping[str, Mapping[str, str]], usual: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Packages, by stage, that had another version than usual."""
    found = {
        stage: {name: version for name, version in made_with.items() if usual.get(name, version) != version}
        for stage, made_with in stages.items()
    }
    return {stage: packages for stage, packages in found.items() if packages}


def timing_of(record: BenchmarkRecord, name: str) -> FileTiming:
    """Timing of a file by its name; raises :class:`CorruptArtifactError` if the benchmark has none."""
    known = {timing.name: timing for timing in record.variants}
    if name not in known:
        raise CorruptArtifactError(
            f"expected a timing of {name} in the benchmark, found {', '.join(known)}; run ziplm-deploy benchmark again"
        )
    return known[name]


def full_sizes(table: LatencyTable) -> dict[str, int]:
    """Heads and columns of every module of the dense model."""
    shape = table.shape
    sizes: dict[ModuleKind, int] = {"attention": shape.n_heads, "ffn": shape.intermediate_size}
    return {str(ModuleId(layer, kind)): size for layer in range(shape.n_layers) for kind, size in sizes.items()}


def member_report(family: FamilyFacts, member: MemberFacts) -> MemberReport:
    """One member with all its files, its verdict and the reason for it."""
    files: list[FileReport] = []
    for file in member.files:
        files.append(_file_report(family, file, files, is_pruned=member.target is not None))
    variant, verdict, reason = family.recipe.exported, "baseline", ""
    if member.target is not None:
        variant = family.recipe.target
        verdict, reason = _judge(family, member, member.target, variant)
    facts: dict[str, Any] = {}
    if family.short is not None and member.target is not None:
        facts["short_speedup"] = timing_of(family.short, member.label(variant)).ratio
    if member.continuations is not None:
        facts["continued"] = dict(zip(member.continuations.prompts, member.continuations.texts, strict=True))
    if member.plan is not None:
        plan = member.plan
        facts |= {
            "predicted_speedup": plan.predicted_speedup,
            "search_loss": plan.search_loss,
            "seed_losses": plan.seed_losses,
            "exchanged_fraction": plan.exchanged_fraction,
        }
    return MemberReport.model_validate(
        {
            "name": member.name,
            "folder": member.name,
            "speedup_target": member.target,
            "parameters": member.parameters,
            "served": next(file for file in files if file.variant is variant),
            "files": files,
            "accuracy_before_training": member.scores_before_training,
            "training": member.training,
            "training_effect": member.training_effect,
            "sizes": member.sizes,
            "corrections": member.corrections,
            "verdict": verdict,
            "reason": reason,
            **facts,
        }
    )


def _judge(family: FamilyFacts, member: MemberFacts, target: float, variant: Variant) -> tuple[str, str]:
    settings = family.recipe.benchmark
    served = next(file for file in member.files if file.variant is variant)
    slowed_by = spared_from_int8(served.int8) or was_fast_enough(member.speedup_in_loop, target, settings)
    largest = family.table.largest_speedup()
    verdict, reason = judge(
        served.timing.ratio, family.record.itself, target, settings, member.corrections, largest, slowed_by
    )
    if verdict == "faster than asked" and member.sizes == full_sizes(family.table):
        reason = f"nothing was pruned: the {variant} file is that fast as it is"
    elif verdict == "faster than asked" and member.refused_plans:
        reason = f"{family.recipe.environment.engine} cannot run the file of a slower plan"
    return verdict, reason


def _file_report(family: FamilyFacts, file: FileFacts, before: list[FileReport], *, is_pruned: bool) -> FileReport:
    timing, max_loss = file.timing, family.recipe.compress.int8.max_loss
    noise = too_noisy(family.record.itself, family.recipe.benchmark)
    beside = beside_baselines(file, family.baselines, noise)
    rivals = not_ahead(beside["beaten"], beside["undecided"])
    served_score = file.scores.get(family.metric)
    reason = why_not_recommended(file, served_score, max_loss, before, noise, is_pruned=is_pruned) or rivals
    weights = {"weights": str(family.recipe.export.gguf)} if file.variant is Variant.GGUF else {}
    return FileReport(
        variant=file.variant,
        file=file.path.name,
        **FileReport.figures(timing),
        onnx_bytes=file.onnx_bytes,
        gzip_bytes=file.gzip_bytes,
        over_torch=over_torch(family.record, timing.name),
        beaten_by=beside["beaten"],
        undecided_against=beside["undecided"],
        accuracy=file.scores,
        by_label=file.by_label,
        accuracy_intervals=file.uncertainty.intervals if file.uncertainty else {},
        of_dense=file.uncertainty.of_dense if file.uncertainty else {},
        budget=budget_decision(file, max_loss),
        of_source=file.uncertainty.of_source if file.uncertainty else None,
        facts=weights | facts_of(file.sparsity, file.int8),
        recommended=not reason,
        reason=reason,
    )


def _int8_notes(facts: FamilyFacts) -> list[str]:
    """What INT8 did to linears: which stayed float32, and which cost more than is allowed."""
    max_loss, may_train = facts.recipe.compress.int8.max_loss, facts.recipe.model.task != "text-generation"
    notes = (
        int8_note(member.label(file.variant), file.int8, max_loss, may_train=may_train)
        for member in facts.members
        for file in member.files
        if file.int8 is not None
    )
    return list(filter(None, notes))
