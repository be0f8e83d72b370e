"""Which linears of a member INT8 hurts: measured once, for its files with and without zeros."""

from __future__ import annotations

from dataclasses import asdict

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.compression.divergence import divergence_from
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.quantize import linear_names
from ziplm_deploy.compression.int8.sensitivity import SensitivityRow, rank_in_all_forms, rank_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.weight_only import asked_bits, check_patterns
from ziplm_deploy.compression.records import LinearRanking, LinearSensitivity
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.deployed import other_form
from ziplm_deploy.models.member_files import load
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run

LOOKED_AT = 32  # examples: each linear takes a forward pass over them
LOOKED_AT_WINDOWS, WINDOW = 8, 64  # of text, and their tokens: a causal language model is a large one here


def ranked_linears(run: Run, member: Member, settings: Int8Settings) -> list[SensitivityRow]:
    """Linears of a member, the most sensitive first; a stage, which writes ``member.linear_ranking``.

    They are ranked in the float32 member, before zeros and training: a choice of linears by this list is judged by its
    score anyway.
    """
    is_causal = run.task.is_causal
    most, cut = (LOOKED_AT_WINDOWS, {"window": WINDOW}) if is_causal else (LOOKED_AT, {})
    n_examples = min(most, run.recipe.compress.int8.n_calibration)
    patterns = settings.config.weight_only_4

    def work() -> None:
        model = load(member.folder)
        rows = run.task.shortened(run.data.calibration_rows[:n_examples], cut.get("window"))
        looked_at = run.data.encode(rows)
        divergence = divergence_from(run.task, model, looked_at)
        onnx = member.folder / Variant.FP32.file_name
        names = linear_names(onnx) if architecture_of(model.config).causal is not None else ()  # type: ignore[arg-type]
        if member is run.dense_member and is_causal:
            check_patterns(names, patterns)
        groups = linear_groups(model, names) if names else None
        weight_only = asked_bits(names, patterns)
        if settings.config.mixed and groups is not None:
            ranked = rank_in_all_forms(model, looked_at, divergence, settings, groups, run.progress.step)
        else:
            ranked = rank_linears(
                model,
                looked_at,
                divergence,
                settings,
                progress=run.progress.step,
                groups=groups,
                weight_only=weight_only,
            )
        linears = [LinearSensitivity(**asdict(row)) for row in ranked]
        LinearRanking(linears=linears).save(member.linear_ranking)

    key = content_key(
        weights=run.file_hash(member.weights),
        per_channel=settings.config.per_channel,
        weight_limit=settings.weight_limit,
        calibration=run.data.calibration_key,
        n_examples=n_examples,
        **cut,
        **({"weight_only_4": patterns} if patterns else {}),
        **({"mixed": True} if settings.config.mixed else {}),
        **other_form(run.dense.model, run.recipe.export, run.recipe.environment),  # its linears have other names
    )
    run.folder.make(f"rank linears {member.name}", key, [member.linear_ranking], work)
    return [SensitivityRow(**row.model_dump()) for row in LinearRanking.load(member.linear_ranking).linears]
