"""The further files of a member: sparse weights first, then INT8 of the plain and of the sparse model."""

from __future__ import annotations

import shutil
from pathlib import Path

from ziplm_deploy.artifacts import atomic_path, content_key
from ziplm_deploy.compression.divergence import divergence_from
from ziplm_deploy.compression.records import SPARSITY_RECORD
from ziplm_deploy.compression.sparsity.linears import prunable_linears
from ziplm_deploy.compression.sparsity.masks import check_masks_in_onnx, zero_masks, zeros_held
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.compression.sparsity.sparsify import sparsify_model
from ziplm_deploy.errors import ParityError
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.member_files import load
from ziplm_deploy.recipe import CompressConfig, SparsityConfig, Variant
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import export_checked, export_key, save_checkpoint
from ziplm_deploy.stages.quantize import quantize_member
from ziplm_deploy.stages.recover import distil, training_key


def compress_member(state: Run, name: str) -> None:
    """Every variant that the recipe asks for, of one member or of the dense model; files of no other variant stay."""
    remove_unlisted(state, name)
    variants = state.recipe.compress.variants
    if any(variant.is_sparse for variant in variants):
        sparsify_member(state, name)
    if Variant.SPARSE in variants:
        _publish(state, name)
    for variant in variants:
        if variant.is_int8:
            quantize_member(state, name, variant)


def remove_unlisted(state: Run, name: str) -> None:
    """Delete files of variants that the recipe no longer asks for."""
    if not distributed.is_first():
        return
    for variant in set(Variant) - set(state.recipe.variants):
        for file in (variant.onnx_file, variant.accuracy_file):
            (state.folder.member(name) / file).unlink(missing_ok=True)


def sparsity_steps(config: CompressConfig) -> list[SparsityConfig]:
    """Sparsities after each of which the model is trained: one, or in ``gradual`` mode one for each pass.

    The density falls by the same factor in each, as it does within :func:`sparsify_model`.
    """
    final = config.sparsity
    if config.train.mode != "gradual":
        return [final]
    density = 1 - final.sparsity
    shares = [(index + 1) / final.passes for index in range(final.passes)]
    return [final.model_copy(update={"sparsity": 1 - density**share, "passes": 1}) for share in shares]


def sparsify_member(state: Run, name: str) -> None:
    """Sparse checkpoint of a member, and its ONNX file, which has exactly the same zeros."""
    recipe, config = state.recipe, state.recipe.compress
    source, folder = state.folder.member(name), state.folder.compressed(name)
    sparse, record = folder / "sparse", folder / SPARSITY_RECORD
    by_sensitivity = config.sparsity.distribution == "sensitivity"
    key = content_key(
        source=state.file_hash(source / "pruned.safetensors"),
        calibration=state.calibration_key,
        sparsity=config.sparsity,
        judged_on=recipe.prune.search.n_sequences if by_sensitivity else None,
        training=training_key(state, config.train) if config.train.mode != "none" else None,
        mode=config.train.mode,
    )
    stage, outputs = f"sparsify {name}", [sparse / "pruned.safetensors", record]
    if not (state.folder.is_current(stage, key) and all(path.exists() for path in outputs)):
        made = source
        for index, step in enumerate(sparsity_steps(config), start=1):
            made = _zero(state, name, made, f"{index}", step, key)
            if config.train.mode != "none":
                made = _train(state, name, made, f"{index}", key)
        state.folder.stage(stage, key, outputs, lambda: _keep(folder, made, sparse, record))
    _export(state, name, sparse)


def _zero(state: Run, name: str, source: Path, step: str, config: SparsityConfig, key: str) -> Path:
    """Folder of ``source`` with its weights zeroed to this sparsity."""
    folder = state.folder.compressed(name) / f"zeroed-{step}"

    def work() -> None:
        model = load(source)
        if not prunable_linears(model):  # every module was dropped: there is nothing to zero
            record = _nothing_zeroed(config)
        else:
            by_sensitivity = config.distribution == "sensitivity"
            record = sparsify_model(
                model,
                state.calibration.hessian,
                config,
                memory_limit_bytes=int(state.recipe.prune.memory_limit_gb * 2**30),
                progress=state.progress.step,
                divergence=divergence_from(state.task, model, state.calibration.search) if by_sensitivity else None,
            )
        save_checkpoint(state, folder, model, {"member": name, "variant": "sparse"})
        record.save(folder / SPARSITY_RECORD)

    outputs = [folder / "pruned.safetensors", folder / SPARSITY_RECORD]
    state.folder.stage(f"zero {name}, {step}", content_key(key=key, step=step), outputs, work)
    return folder


def _nothing_zeroed(config: SparsityConfig) -> SparsityRecord:
    return SparsityRecord(
        sparsity=0.0,
        pattern=config.pattern,
        distribution=config.distribution,
        passes=config.passes,
        relative_damping=config.damping,
        n_tokens=0,
        linears=[],
    )


def _train(state: Run, name: str, source: Path, step: str, key: str) -> Path:
    """Folder of ``source`` trained with its zeros held."""
    folder = state.folder.compressed(name) / f"trained-{step}"
    checkpoints = state.folder.path / "recovery" / f"{name}-sparse-{step}-{key[:12]}"

    def work() -> None:
        model = load(source)
        with zeros_held(model, zero_masks(model)):
            training = distil(state, model, state.recipe.compress.train, checkpoints, f"{name} sparse")
        if distributed.is_first():
            save_checkpoint(state, folder, model, {"member": name, "variant": "sparse"})
            training.save(folder / "training.json")
            shutil.copyfile(source / SPARSITY_RECORD, folder / SPARSITY_RECORD)
            shutil.rmtree(checkpoints.parent, ignore_errors=True)

    outputs = [folder / "pruned.safetensors", folder / SPARSITY_RECORD]
    stage, its_key = f"train {name} sparse, {step}", content_key(key=key, step=step)
    state.folder.stage(stage, its_key, outputs, work, together=True)
    return folder


def _keep(folder: Path, made: Path, sparse: Path, record: Path) -> None:
    """The last step becomes the sparse checkpoint; those before it go."""
    shutil.copyfile(made / SPARSITY_RECORD, record)
    shutil.rmtree(sparse, ignore_errors=True)
    made.rename(sparse)
    for path in (*folder.glob("zeroed-*"), *folder.glob("trained-*")):
        shutil.rmtree(path, ignore_errors=True)


def _export(state: Run, name: str, folder: Path) -> None:
    path = folder / Variant.FP32.onnx_file

    def work() -> None:
        model = load(folder)
        export_checked(state, model, folder, f"{name} sparse")
        try:
            check_masks_in_onnx(path, model)
        except ParityError:
            path.unlink()
            raise

    key = export_key(state, state.file_hash(folder / "pruned.safetensors"))
    state.folder.stage(f"export {name} sparse", key, [path], work)


def _publish(state: Run, name: str) -> None:
    source = state.folder.compressed(name) / "sparse" / Variant.FP32.onnx_file
    target = state.folder.member(name) / Variant.SPARSE.onnx_file

    def copy() -> None:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)

    state.folder.stage(f"publish {name} sparse", state.file_hash(source), [target], copy)
