"""``report.json``, ``report.md`` and a model card in every member's folder."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ziplm_deploy.artifacts import file_bytes, write_text
from ziplm_deploy.baselines import BaselineRecord, BaselineScores
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.documents import read_json
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.architectures import ARCHITECTURES
from ziplm_deploy.models.location import CONFIG_FILE
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import Variant
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.card import model_card
from ziplm_deploy.reporting.collect import family_report, full_sizes, timing_of
from ziplm_deploy.reporting.facts import BaselineFacts, FamilyFacts, FileFacts, GgufFacts, MemberFacts
from ziplm_deploy.reporting.markdown import family_markdown
from ziplm_deploy.reporting.records import FamilyReport, TextWindows
from ziplm_deploy.run.baseline import BaselineFiles
from ziplm_deploy.run.gguf import GgufFile
from ziplm_deploy.run.member import Member, ModelFile, PrunedMember
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.baselines import made_baselines
from ziplm_deploy.stages.benchmark import short_benchmark_of
from ziplm_deploy.stages.continuations import continuations_of
from ziplm_deploy.stages.evaluate import label_scores_of, scores_of
from ziplm_deploy.stages.formats import measured_gguf_files
from ziplm_deploy.stages.gains import baseline_scores, scored_as
from ziplm_deploy.stages.prune import member_key
from ziplm_deploy.stages.quantize import int8_record
from ziplm_deploy.stages.retrieval import retrieval_scores_of
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import PLAIN_PAGES, dense_as_served, refused_files
from ziplm_deploy.stages.uncertainty import uncertainty_of, uncertainty_of_file


def write_report(run: Run) -> FamilyReport:
    """Write the report of a run; it only reads what the stages left.

    Raises:
        CorruptArtifactError: benchmark, plan or weights of a member are missing or damaged.
        StorageError: a file cannot be written.
    """
    run.folder.count_rest()
    run.folder.save()  # also when every stage was skipped: the recipe may differ in what only the report reads
    report = family_report(family_facts(run))
    if distributed.is_first():
        dims = run.recipe.model.dimensions or ()
        for member, row in zip(run.members, report.members, strict=True):
            write_text(member.folder / "README.md", model_card(report, row, ort_class_of(run), dims))
        write_text(run.folder.path / "report.md", family_markdown(report))
        report.save(run.folder.path / "report.json")
    return report


def ort_class_of(run: Run) -> str | None:
    """Class of optimum that opens the members; None for a type that it does not know, or files not made for it."""
    if run.task.is_causal and not run.recipe.export.stock_optimum:
        return None
    config = run.dense_member.folder / CONFIG_FILE
    model_type = read_json(config).get("model_type") if config.exists() else None
    known = ARCHITECTURES.get(str(model_type))
    return run.task.ort_class if known is None or known.in_optimum else None


def _windows(run: Run) -> TextWindows | None:
    """Windows of the evaluation text; None for models that do not read it as one stream."""
    lengths = run.folder.lengths.get("evaluation")
    if not run.task.is_causal or lengths is None:
        return None
    return TextWindows(context=lengths.longest, stride=run.recipe.data.stride or lengths.longest)


def family_facts(run: Run) -> FamilyFacts:
    """Everything that is known about the members."""
    record, beside = BenchmarkRecord.load(run.folder.benchmark), baseline_scores(run)
    return FamilyFacts(
        recipe=run.recipe,
        metric=run.task.metric_name,
        record=record,
        table=run.table,
        members=[_member_facts(run, member, record, beside) for member in run.members],
        notes=run.folder.notes,
        lengths=run.folder.lengths,
        short=short_benchmark_of(run),
        retrieval=retrieval_scores_of(run),
        windows=_windows(run),
        sampled_texts=run.data.sampled_texts,
        stage_seconds=run.folder.stage_seconds,
        stage_versions=run.folder.stage_versions,
        baselines=[_baseline_facts(run, files, record, beside) for files in made_baselines(run)],
        gguf=[_gguf_facts(run, file, record) for file in measured_gguf_files(run)],
        plain_pages=next((timing for timing in record.variants if timing.name == PLAIN_PAGES), None),
    )


def _gguf_facts(run: Run, file: GgufFile, record: BenchmarkRecord) -> GgufFacts:
    variant = run.recipe.exported if file.member.is_dense else run.recipe.target
    return GgufFacts(
        file.member.name,
        file.member.file(variant).label,
        file.file_type,
        file.path,
        file.path.stat().st_size,
        timing_of(record, file.label),
        scores_of(run, file),
        uncertainty_of_file(run, file),
    )


def _baseline_facts(run: Run, files: BaselineFiles, record: BenchmarkRecord, beside: BaselineScores) -> BaselineFacts:
    return BaselineFacts(
        files.name,
        files.page.title,
        BaselineRecord.load(files.record),
        sum(path.stat().st_size for path in files.paths),
        timing_of(record, files.name),
        scores_of(run, scored_as(run, files)),
        beside.baselines.get(files.name),
    )


def _member_facts(run: Run, member: Member, record: BenchmarkRecord, beside: BaselineScores) -> MemberFacts:
    uncertainty = uncertainty_of(run)
    files, parameters = _files(run, member, record, beside), parameter_count(member.weights)
    if not isinstance(member, PrunedMember):
        sizes, written = full_sizes(run.table), continuations_of(run, member)
        return MemberFacts(member.name, None, None, sizes, parameters, files, continuations=written)
    plan = PruningPlan.load(member.plan)
    correction = run.folder.correction(member.name, member_key(run, member))
    parent = run.generation_of(member).parent.name
    in_loop = BenchmarkRecord.load(run.folder.generation_benchmark(parent)).variant(member.name).speedup
    return MemberFacts(
        member.name,
        member.target,
        plan,
        plan.sizes,
        parameters,
        files,
        scores_before_training=scores_of(run, member.as_pruned) if run.trains else {},
        training=TrainingRecord.load(member.training_record) if run.trains else None,
        training_effect=uncertainty.training.get(member.name) if run.trains and uncertainty else None,
        continuations=continuations_of(run, member),
        corrections=correction.corrections + correction.float32_restarts if correction else 0,
        refused_plans=correction.refused_plans if correction else 0,
        speedup_in_loop=in_loop,
    )


def _files(run: Run, member: Member, record: BenchmarkRecord, beside: BaselineScores) -> list[FileFacts]:
    """Files of a member that its engine runs; the exported one of dense twice if it was timed on two engines."""
    recipe, refused = run.recipe, refused_files(run)
    timed = [(member.file(variant), member.file(variant).label) for variant in Variant if variant in recipe.variants]
    if member.is_dense and recipe.baseline_engine != recipe.environment.engine:
        timed.insert(1, (member.as_exported, dense_as_served(run)))
    return [_file_facts(run, file, name, record, beside) for file, name in timed if name not in refused]


def _file_facts(run: Run, file: ModelFile, timed_as: str, record: BenchmarkRecord, beside: BaselineScores) -> FileFacts:
    path = file.path
    if not path.exists():
        raise CorruptArtifactError(f"expected an exported model at {path}, found none; run ziplm-deploy export again")
    only_timed = timed_as == dense_as_served(run)  # scores of dense are those of the baseline's engine
    return FileFacts(
        variant=file.variant,
        path=path,
        onnx_bytes=file_bytes(path),
        gzip_bytes=run.folder.gzip_bytes(run.file_hash(path)),
        timing=timing_of(record, timed_as),
        scores={} if only_timed else scores_of(run, file),
        by_label={} if only_timed else label_scores_of(run, file),
        sparsity=SparsityRecord.load(file.member.sparsity_record) if file.variant.is_sparse else None,
        int8=int8_record(file),
        uncertainty=None if only_timed else uncertainty_of_file(run, file),
        baseline_gains=beside.gains.get(timed_as, {}),
    )


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


STAGE = Stage("report", lambda run: "report and model cards", write_report)
