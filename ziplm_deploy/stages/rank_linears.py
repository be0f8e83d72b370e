"""Which linears of a member INT8 hurts: measured once, for its files with and without zeros."""

from __future__ import annotations

from dataclasses import asdict

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.compression.divergence import divergence_from
from ziplm_deploy.compression.int8.sensitivity import SensitivityRow, rank_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.records import LinearRanking, LinearSensitivity
from ziplm_deploy.models.member_files import load
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run

LOOKED_AT = 32  # examples: each linear takes a forward pass over them


def ranked_linears(run: Run, member: Member, settings: Int8Settings) -> list[SensitivityRow]:
    """Linears of a member, the most sensitive first; a stage, which writes ``member.linear_ranking``.

    They are ranked in the float32 member, before zeros and training: a choice of linears by this list is judged by its
    score anyway.
    """
    n_examples = min(LOOKED_AT, run.recipe.compress.int8.n_calibration)

    def work() -> None:
        model = load(member.folder)
        looked_at = run.data.encode(run.data.calibration_rows[:n_examples])
        divergence = divergence_from(run.task, model, looked_at)
        rows = rank_linears(model, looked_at, divergence, settings, progress=run.progress.step)
        linears = [LinearSensitivity(**asdict(row)) for row in rows]
        LinearRanking(linears=linears).save(member.linear_ranking)

    key = content_key(
        weights=run.file_hash(member.weights),
        per_channel=settings.config.per_channel,
        weight_limit=settings.weight_limit,
        calibration=run.data.calibration_key,
        n_examples=n_examples,
    )
    run.folder.make(f"rank linears {member.name}", key, [member.linear_ranking], work)
    return [SensitivityRow(**row.model_dump()) for row in LinearRanking.load(member.linear_ranking).linears]
