"""The further files of a member: sparse weights first, then INT8 of the plain and of the sparse model."""

from __future__ import annotations

import shutil

from ziplm_deploy import distributed
from ziplm_deploy.artifacts import atomic_path
from ziplm_deploy.checkpoints import load
from ziplm_deploy.compression.divergence import divergence_from
from ziplm_deploy.compression.masks import check_masks_in_onnx, held, zero_masks
from ziplm_deploy.compression.quantise import quantise_member
from ziplm_deploy.compression.records import SPARSITY_RECORD
from ziplm_deploy.compression.sparsity import sparsify_model
from ziplm_deploy.compression.variants import ONNX_FILES, is_int8, is_sparse
from ziplm_deploy.members import export_checked, export_key, save_checkpoint
from ziplm_deploy.recovery.recover import distil, training_key
from ziplm_deploy.run import Run
from ziplm_deploy.run_folder import content_key


def compress_member(state: Run, name: str) -> None:
    """Every variant that the recipe asks for, of one member or of the dense model."""
    variants = state.recipe.compress.variants
    if any(map(is_sparse, variants)):
        sparsify_member(state, name)
    if "sparse" in variants:
        _publish(state, name)
    for variant in filter(is_int8, variants):
        quantise_member(state, name, variant)


def sparsify_member(state: Run, name: str) -> None:
    """Sparse checkpoint and its ONNX file in the member's folder of compression; the file has exactly these zeros."""
    recipe, config = state.recipe, state.recipe.compress
    source, folder = state.folder.member(name), state.folder.compressed(name)
    trains, by_sensitivity = config.train.mode != "none", config.sparsity.distribution == "sensitivity"
    key = content_key(
        source=state.file_hash(source / "pruned.safetensors"),
        calibration=state.calibration_key,
        sparsity=config.sparsity,
        training=training_key(state, config.train) if trains else None,
    )

    def work() -> None:
        model = load(source)
        record = sparsify_model(
            model,
            state.calibration.hessian,
            config.sparsity,
            memory_limit_bytes=int(recipe.prune.memory_limit_gb * 2**30),
            progress=state.progress.step,
            divergence=divergence_from(state.task, model, state.calibration.search) if by_sensitivity else None,
        )
        checkpoints = state.folder.path / "recovery" / f"{name}-sparse-{key[:12]}"
        training = None
        if trains:
            with held(model, zero_masks(model)):
                training = distil(state, model, config.train, checkpoints, f"{name} sparse")
        if distributed.is_first():
            save_checkpoint(state, folder, model, {"member": name, "variant": "sparse"})
            record.save(folder / SPARSITY_RECORD)
            if training is not None:
                training.save(folder / "training.json")
            shutil.rmtree(checkpoints.parent, ignore_errors=True)

    state.folder.stage(
        f"sparsify {name}", key, [folder / "pruned.safetensors", folder / SPARSITY_RECORD], work, together=trains
    )
    path = folder / ONNX_FILES["fp32"]

    def export() -> None:
        model = load(folder)
        export_checked(state, model, folder, f"{name} sparse")
        check_masks_in_onnx(path, model)

    state.folder.stage(
        f"export {name} sparse", export_key(state, state.file_hash(folder / "pruned.safetensors")), [path], export
    )


def _publish(state: Run, name: str) -> None:
    source, target = (
        state.folder.compressed(name) / ONNX_FILES["fp32"],
        state.folder.member(name) / ONNX_FILES["sparse"],
    )

    def copy() -> None:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)

    state.folder.stage(f"publish {name} sparse", state.file_hash(source), [target], copy)
