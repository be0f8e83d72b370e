"""One Hessian pass over a parent, and the database of levels that serves all targets pruned from it."""

from __future__ import annotations

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.pruning.parent import Parent
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.stage import Stage


def calibrate(run: Run, generation: Generation) -> None:
    """Database of a generation's parent."""
    member, parent = generation.parent, run.parent(generation.parent)
    stage = "calibrate" if member.is_dense else f"calibrate {member.name}"

    def work() -> None:
        note_few_tokens(run)
        own = member.is_dense or run.recipe.recover.rebuild_hessians
        parent.build_database(run.progress, hessians_of=None if own else run.dense.model)

    run.folder.make(stage, database_key(run, member, parent), [parent.database_path], work)


def database_key(run: Run, member: Member, parent: Parent) -> str:
    """Everything that the database of a parent depends on."""
    recipe = run.recipe
    return content_key(
        model=run.dense.hash,
        parent=None if member.is_dense else run.file_hash(member.weights),
        calibration=run.data.calibration_key,
        prune=recipe.prune.model_dump(include={"method", "damping", "centred", "fisher"}),
        hessians="own" if recipe.recover.rebuild_hessians or member.is_dense else "dense",
        sizes=parent.sizes,
    )


def note_few_tokens(run: Run) -> None:
    """Leave a note where there are fewer calibration tokens than four times the FFN width."""
    n_tokens, wanted = run.data.count_tokens(), 4 * run.dense.shape.intermediate_size
    text = f"calibration has {n_tokens} tokens, {wanted} (4 x the FFN width) are wanted: more data may prune better"
    run.folder.set_note("calibration tokens", text if n_tokens < wanted else None)
    if n_tokens < wanted:
        run.progress.note(text)


STAGE = Stage(
    "calibrate",
    lambda run, generation: f"Hessians of {generation.parent.name} and the database of OBS levels",
    calibrate,
)
