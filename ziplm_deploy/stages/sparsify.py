"""Zeros in the weights of a member: its sparse checkpoint, trained if the recipe says so, and its ONNX file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ziplm_deploy.artifacts import atomic_folder, atomic_path, content_key
from ziplm_deploy.compression.divergence import Divergence
from ziplm_deploy.compression.sparsity.masks import check_masks_in_onnx, zero_masks, zeros_held
from ziplm_deploy.compression.sparsity.record import SparsityRecord
from ziplm_deploy.compression.sparsity.sparsify import sparsify_model
from ziplm_deploy.errors import ParityError
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.member_files import WEIGHTS_FILE, load, replace_member
from ziplm_deploy.models.modules import layer_linears
from ziplm_deploy.recipe import CompressConfig, SparsityConfig, Variant
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.export import export_checked, export_key, export_stage, make_checked
from ziplm_deploy.stages.recover import distillation, training_key


@dataclass(frozen=True)
class _Step:
    """One step towards the sparsity of a member: zeros, then, maybe, a training with them held."""

    run: Run
    member: Member
    number: str
    config: SparsityConfig
    key: str  # of all steps together

    def folder(self, kind: str) -> Path:
        return self.member.compressed_folder / f"{kind}-{self.number}"

    def make(self, what: str, folder: Path, work: Callable[[], None], *, together: bool = False) -> Path:
        outputs = [folder / WEIGHTS_FILE, folder / self.member.sparsity_record.name]
        stage, key = f"{what}, {self.number}", content_key(key=self.key, step=self.number)
        self.run.folder.make(stage, key, outputs, work, together=together)
        return folder


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


def sparsify_member(run: Run, member: Member) -> None:
    """Sparse checkpoint of a member, and its ONNX file, which has exactly the same zeros."""
    recipe, config = run.recipe, run.recipe.compress
    by_sensitivity = config.sparsity.distribution == "sensitivity"
    key = content_key(
        source=run.file_hash(member.weights),
        calibration=run.data.calibration_key,
        sparsity=config.sparsity,
        judged_on=recipe.prune.search.n_sequences if by_sensitivity else None,
        training=training_key(run, config.train) if config.train.mode != "none" else None,
        mode=config.train.mode,
    )
    stage, outputs = (
        f"sparsify {member.name}",
        [member.sparse_folder / WEIGHTS_FILE, member.sparsity_record, member.sparse_folder],
    )
    if not (run.folder.is_made(stage, key) and all(path.exists() for path in outputs)):
        made = member.folder
        for index, step_config in enumerate(sparsity_steps(config), start=1):
            step = _Step(run, member, f"{index}", step_config, key)
            made = _zero(step, made)
            if config.train.mode != "none":
                made = _train(step, made)
        run.folder.make(stage, key, outputs, lambda: _keep(member, made))
    _drop_steps(member)
    _export(run, member)


def _zero(step: _Step, source: Path) -> Path:
    """Folder of ``source`` with its weights zeroed to this sparsity."""
    run, member, config = step.run, step.member, step.config
    folder = step.folder("zeroed")

    def work() -> None:
        model = load(source)
        if not layer_linears(model):  # every module was dropped: there is nothing to zero
            record = SparsityRecord.of_nothing(config)
        else:
            by_sensitivity = config.distribution == "sensitivity"
            record = sparsify_model(
                model,
                run.data.calibration.hessian,
                config,
                memory_limit_bytes=int(run.recipe.prune.memory_limit_gb * 2**30),
                progress=run.progress.step,
                divergence=Divergence(run.task, model, run.data.calibration.search) if by_sensitivity else None,
            )
        _replace(step, folder, model)
        record.save(folder / member.sparsity_record.name)

    return step.make(f"zero {member.name}", folder, work)


def _train(step: _Step, source: Path) -> Path:
    """Folder of ``source`` trained with its zeros held."""
    run, member = step.run, step.member
    folder = step.folder("trained")
    training_name = f"{member.name}-sparse-{step.number}"
    checkpoints = run.folder.checkpoints(training_name, step.key)

    def work() -> None:
        model = load(source)
        with zeros_held(model, zero_masks(model)):
            training = distillation(run).train(model, run.recipe.compress.train, checkpoints, f"{member.name} sparse")
        if distributed.is_first():
            _replace(step, folder, model)
            training.save(folder / member.training_record.name)
            shutil.copyfile(source / member.sparsity_record.name, folder / member.sparsity_record.name)

    step.make(f"train {member.name} sparse", folder, work, together=True)
    run.folder.drop_checkpoints(training_name)
    return folder


def _replace(step: _Step, folder: Path, model: nn.Module) -> None:
    extra = {"member": step.member.name, "variant": "sparse"}
    replace_member(folder, model, step.run.dense.processor, step.run.recipe.model, extra)


def _keep(member: Member, made: Path) -> None:
    """The last step becomes the sparse checkpoint."""
    with atomic_path(member.sparsity_record) as temporary:
        shutil.copyfile(made / member.sparsity_record.name, temporary)
    with atomic_folder(member.sparse_folder) as making:
        shutil.copytree(made, making, dirs_exist_ok=True)


def _drop_steps(member: Member) -> None:
    """Remove the steps when what they lead to is recorded: a run that was killed before goes on from them."""
    if not distributed.is_first():
        return
    for pattern in ("zeroed-*", "trained-*"):
        for path in member.compressed_folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _export(run: Run, member: Member) -> None:
    folder = member.sparse_folder
    path = folder / Variant.FP32.file_name

    def work() -> float:
        model = load(folder)
        difference = export_checked(run, model, path, f"{member.name} sparse")
        try:
            check_masks_in_onnx(path, model)
        except ParityError:
            path.unlink()
            raise
        return difference

    key = export_key(run, run.file_hash(folder / WEIGHTS_FILE))
    make_checked(run, export_stage(member, folder), key, [path], work)


def publish_sparse(run: Run, member: Member) -> None:
    """``model_sparse.onnx`` in the member's folder."""
    source = member.sparse_folder / Variant.FP32.file_name
    target = member.file(Variant.SPARSE).path

    def copy() -> None:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)

    run.folder.make(f"publish {member.name} sparse", run.file_hash(source), [target], copy)
