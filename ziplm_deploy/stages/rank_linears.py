"""Which linears of a member INT8 hurts: measured once, for its files with and without zeros."""

from __future__ import annotations

from dataclasses import asdict

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.compression.divergence import Divergence
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.quantize import linear_names
from ziplm_deploy.compression.int8.sensitivity import rank_in_all_forms, rank_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.smoothing import choose_strengths
from ziplm_deploy.compression.int8.weight_only import asked_bits, check_patterns
from ziplm_deploy.compression.records import LinearRanking, LinearSensitivity
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.deployed import other_form
from ziplm_deploy.models.member_files import load
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.prepare_weights import JUDGED, WINDOWS, can_be_smoothed, rounded_linears, watched_batches
from ziplm_deploy.tasks.batching import Batch

LOOKED_AT = 32  # examples: each linear takes a forward pass over them
MEASURED = 2  # how a divergence is: of all but the first token, weight-only forms with inputs in blocks
WINDOW = 64  # tokens of windows of text: a causal language model is a large one here


def looked_at(run: Run) -> list[Batch]:
    """Examples that linears are ranked, and their inputs smoothed, by."""
    rows = run.data.calibration_rows[: _n_looked_at(run)]
    return run.data.encode(run.task.shortened(rows, WINDOW if run.task.is_causal else None))


def _n_looked_at(run: Run) -> int:
    return min(JUDGED if run.task.is_causal else LOOKED_AT, run.recipe.compress.int8.n_calibration)


def ranked_linears(run: Run, member: Member, settings: Int8Settings) -> LinearRanking:
    """Linears of a member, the most sensitive first; a stage, which writes ``member.linear_ranking``.

    They are ranked in the float32 member, before zeros and training: a choice of linears by this list is judged by its
    score anyway. Where inputs are smoothed, they are before that.
    """
    is_causal, n_examples = run.task.is_causal, _n_looked_at(run)
    cut = {"window": WINDOW, "measured": MEASURED} if is_causal else {}
    smooths = {"smooth": True} if is_causal and settings.config.smooth else {}
    patterns = settings.config.weight_only_4

    def work() -> None:
        batches = looked_at(run)
        model = load(member.folder)
        divergence = Divergence(run.task, model, batches)
        onnx = member.folder / Variant.FP32.file_name
        names = linear_names(onnx) if architecture_of(model.config).causal is not None else ()  # type: ignore[arg-type]
        if member is run.dense_member and is_causal:
            check_patterns(names, patterns)
        groups = linear_groups(model, names) if names else None
        weight_only = asked_bits(names, patterns)
        four = (groups or {}) if settings.config.mixed else weight_only
        strengths: dict[str, float] = {}
        if smooths:
            left_out = {path for name in weight_only for path in (groups or {})[name]}
            watched, step = watched_batches(run), run.progress.step
            strengths = choose_strengths(model, watched, batches, divergence, settings, left_out, step)
            if strengths and not can_be_smoothed(run, load(member.folder), strengths, member.name):
                model, strengths = load(member.folder), {}
                divergence = Divergence(run.task, model, batches)
        paths = {path for name in four for path in (groups or {})[name]}
        gptq = rounded_linears(run, model, paths) if paths else {}
        if settings.config.mixed and groups is not None:
            ranked = rank_in_all_forms(model, batches, divergence, settings, groups, run.progress.step, gptq)
        else:
            step = run.progress.step
            ranked = rank_linears(model, batches, divergence, settings, step, groups, weight_only, gptq)
        linears = [LinearSensitivity(**asdict(row)) for row in ranked]
        LinearRanking(linears=linears, smoothing=strengths).save(member.linear_ranking)

    key = content_key(
        weights=run.file_hash(member.weights),
        per_channel=settings.config.per_channel,
        weight_limit=settings.weight_limit,
        calibration=run.data.calibration_key,
        n_examples=n_examples,
        **cut,
        **smooths,
        **({"gptq": WINDOWS} if patterns or settings.config.mixed else {}),
        **({"weight_only_4": patterns} if patterns else {}),
        **({"mixed": True} if settings.config.mixed else {}),
        **other_form(run.dense.model, run.recipe.export, run.recipe.environment),  # its linears have other names
    )
    run.folder.make(f"rank linears {member.name}", key, [member.linear_ranking], work)
    return LinearRanking.load(member.linear_ranking)
