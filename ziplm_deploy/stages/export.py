"""``model.onnx`` of every model, checked against torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from exporters.files import temporary_name
from ziplm_deploy.artifacts import atomic_path, content_key
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.errors import ParityError
from ziplm_deploy.models.member_files import load, replace_member
from ziplm_deploy.recipe import Variant
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.stage import Stage


def export_generation(run: Run, generation: Generation) -> None:
    """Files of the dense model and of a generation's members as pruned."""
    export_dense(run)
    for member in generation.members:
        export_pruned(run, member)


def export_trained(run: Run) -> None:
    """Files of all members that were trained; the others have theirs already."""
    if run.trains:
        for member in run.pruned_members:
            export_member(run, member, member.folder)


def export_dense(run: Run) -> None:
    """Checkpoint and ``model.onnx`` of the dense model."""
    member = run.dense_member
    path = member.file(Variant.FP32).onnx

    def work() -> float:
        replace_member(member.folder, run.dense.model, run.dense.processor, run.recipe.model, {"member": member.name})
        return export_checked(run, run.dense.model, path, member.name)

    make_checked(
        run, f"export {member.name}", export_key(run, run.dense.hash), [path, member.weights, member.folder], work
    )


def export_pruned(run: Run, member: Member) -> None:
    """ONNX file of a member as pruned and, where its target is of another variant, one as fast as that will be."""
    export_member(run, member, member.pruned_folder)
    if run.recipe.compress.target is not Variant.FP32:
        export_stand_in(run, member)


def export_member(run: Run, member: Member, folder: Path) -> None:
    """``model.onnx`` beside a member's weights; raises :class:`ParityError` if it does not answer like torch."""
    path = folder / Variant.FP32.onnx_file
    key = export_key(run, run.file_hash(folder / member.weights.name))
    stage = f"export {member.name}" if folder == member.folder else f"export pruned {member.name}"
    make_checked(run, stage, key, [path], lambda: export_checked(run, load(folder), path, member.name))


def export_key(run: Run, source: str) -> str:
    """Everything that an exported file depends on; ``source`` stands for the weights."""
    workload = run.recipe.environment.workload
    # Not the shares of calls; files of causal language models take texts of any length.
    shape = {} if run.task.is_causal else {"batch_size": workload.batch_size, "seq_len": workload.seq_len}
    return content_key(
        source=source,
        model=run.model_settings,
        export=run.recipe.export.of_onnx,
        environment=shape,
    )


def make_checked(run: Run, stage: str, key: str, outputs: list[Path], work: Callable[[], float]) -> None:
    """Make a stage whose ``work`` exports a file and returns how far it is from torch; raises :class:`ParityError`."""
    run.folder.make(stage, key, outputs, lambda: run.folder.set_difference(stage, work()))
    check_difference(run, stage)


def check_difference(run: Run, stage: str) -> None:
    """Refuse a file that was made when the recipe allowed a larger difference to torch; no key holds that limit."""
    found, allowed = run.folder.difference(stage), run.recipe.benchmark.parity_atol
    if found is not None and found > allowed:
        raise ParityError(
            f"expected the file of stage {stage!r} within {allowed:g} of torch (benchmark.parity_atol), found a "
            f"difference of {found:.1e} when it was made; allow that, or report the model"
        )


def export_checked(run: Run, model: nn.Module, path: Path, title: str) -> float:
    """Export ``model`` and compare the file with torch on random inputs: the largest difference."""
    difference = run.onnx_export.write(model, path, title)
    run.progress.note(f"{title}: largest difference to torch {difference:.1e}")
    return difference


def export_stand_in(run: Run, member: Member) -> None:
    """A file as fast as a pruned member will be in the target's variant, which does not exist before it is trained."""
    recipe, treatment = run.recipe, target_treatment(run.recipe)
    assert treatment is not None
    path = member.stand_in(recipe.compress.target)
    key = content_key(
        source=run.file_hash(member.pruned_weights),
        form=treatment.description,
        model=run.model_settings,
        seed=recipe.seed,
        export=recipe.export.of_onnx,
        environment=recipe.environment.fingerprint,
    )

    def work() -> None:
        export_to_be_timed(run, load(member.pruned_folder), path, member.name)

    run.folder.make(f"stand-in {member.name}", key, [path], work)


def export_to_be_timed(run: Run, model: nn.Module, path: Path, name: str) -> None:
    """A file as fast as ``model``, which may be changed in place, in the variant that targets are about."""
    treatment = target_treatment(run.recipe)
    if treatment is None:
        run.onnx_export.write_to_be_timed(model, path, name)
        return
    scratch = temporary_name(path)
    made = scratch / Variant.FP32.onnx_file
    try:
        model = treatment.prepare(model)
        _, inputs = run.onnx_export.write_to_be_timed(model, made, name)
        treatment.finish(made, inputs)
        with atomic_path(path) as temporary:
            shutil.copyfile(made, temporary)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


PRUNED = Stage("export", lambda run, generation: "ONNX files, checked against torch", export_generation)
TRAINED = Stage(
    "export",
    lambda run: "the trained models as ONNX files, checked against torch",
    export_trained,
    shown=lambda recipe: recipe.recover.mode != "none",
)
