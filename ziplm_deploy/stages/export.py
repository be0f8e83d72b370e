"""One member of the family: its plan, its folder, its ONNX file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from exporters.encoder import ExportError, ExportSettings, dummy_inputs, export_encoder
from exporters.heads import EmbeddingModel
from exporters.parity import ParityMismatch, check_parity
from ziplm_deploy.artifacts import content_key
from ziplm_deploy.errors import ParityError, StorageError, UsageError
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.recipe import ExportConfig, ModelConfig, Variant
from ziplm_deploy.run.run import Run
from ziplm_deploy.tasks import Task


def deployed_form(model: nn.Module, settings: ModelConfig, export: ExportConfig) -> nn.Module:
    """The model with what else goes into the graph: pooling and normalization of sentence embeddings."""
    if settings.task == "sentence-similarity" and export.embed_in_graph:
        return EmbeddingModel(model, settings.pooling, settings.normalize).eval()
    return model


def output_names(task: Task, export: ExportConfig) -> list[str]:
    """Outputs of the graph, those of :func:`deployed_form`."""
    return [name for name in task.output_names if name != "sentence_embedding" or export.embed_in_graph]


def member_key(state: Run, target: float) -> str:
    """Everything that the pruned member of a target depends on, but for the closed loop's correction."""
    recipe = state.recipe
    return content_key(
        database=state.parent_of(target).key(),
        table=state.table,
        prune=recipe.prune.model_dump(exclude={"memory_limit_gb"}),
        seed=recipe.seed,
        target=target,
    )


def prune_member(state: Run, target: float) -> None:
    """Plan and checkpoint of one target; as corrected by the closed loop, if it was before."""
    name, key = state.member_name(target), member_key(state, target)
    correction = state.folder.correction(name, key)
    predicted_target = correction.predicted_target if correction else target
    folder, plan_path = state.folder.pruned(name), state.folder.plan(name)

    def work() -> None:
        planner = state.parent_of(target).planner
        solved_before = correction is not None and correction.count > 0 and plan_path.exists()
        previous = PruningPlan.load(plan_path).sizes if solved_before else None
        plan = planner.plan(target, predicted_target, previous, state.progress.step)
        model = planner.build(plan, state.progress.step)
        save_checkpoint(state, folder, model, {"member": name})
        plan.save(plan_path)
        state.progress.note(f"{name}: predicted {plan.predicted_speedup:.2f}x after {plan.evaluations} evaluated plans")

    # Without training a member is pruned in its own folder, where a trained one may lie from before.
    full_key = content_key(key=key, predicted_target=predicted_target, trained_later=state.trains)
    state.folder.stage(f"prune {name}", full_key, [plan_path, folder / "pruned.safetensors"], work)


def save_checkpoint(state: Run, folder: Path, model: nn.Module, extra: dict[str, Any]) -> None:
    """Replace a folder by one with this model, whole or not at all."""
    making = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)  # of a run that was killed
    try:
        save_member(making, model, state.processor, state.recipe.model, extra)
        if folder.exists():
            shutil.rmtree(folder)  # an ONNX file of an earlier plan must not stay beside the new weights
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def export_dense(state: Run) -> None:
    """Checkpoint and ``model.onnx`` of the dense model."""
    folder = state.folder.member(DENSE)

    def work() -> None:
        save_checkpoint(state, folder, state.dense, {"member": DENSE})
        export_checked(state, state.dense, folder, DENSE)

    key = export_key(state, state.model_hash)
    state.folder.stage(f"export {DENSE}", key, [folder / "model.onnx", folder / "pruned.safetensors"], work)


def export_pruned(state: Run, name: str) -> None:
    """ONNX file of a member as pruned and, where its target is of another variant, one as fast as that will be."""
    export_member(state, name, state.folder.pruned(name))
    if state.recipe.compress.target is not Variant.FP32:
        from ziplm_deploy.compression.treatment import export_stand_in

        export_stand_in(state, name)


def export_member(state: Run, name: str, folder: Path) -> None:
    """``model.onnx`` beside a member's weights; raises :class:`ParityError` if it does not answer like torch."""
    key = export_key(state, state.file_hash(folder / "pruned.safetensors"))
    stage = f"export {name}" if folder == state.folder.member(name) else f"export pruned {name}"
    state.folder.stage(stage, key, [folder / "model.onnx"], lambda: export_checked(state, load(folder), folder, name))


def export_key(state: Run, source: str) -> str:
    """What an exported file depends on; ``source`` stands for the weights."""
    return content_key(
        source=source,
        model=state.model_settings,
        export=state.recipe.export,
        environment=state.recipe.environment.workload,
    )


def export_checked(state: Run, model: nn.Module, folder: Path, name: str) -> None:
    """Export ``model`` into a folder and compare it with torch on random inputs."""
    recipe = state.recipe
    environment, export = recipe.environment, recipe.export
    settings = ExportSettings(
        export.shapes, export.opset, environment.workload.batch_size, environment.workload.seq_len
    )
    model = deployed_form(model, recipe.model, recipe.export)
    path = folder / "model.onnx"
    try:
        inputs = dummy_inputs(model, settings)
        export_encoder(model, inputs, output_names(state.task, recipe.export), path, settings)
    except ExportError as error:
        raise UsageError(f"{name}: {error}") from error
    except OSError as error:
        raise StorageError(
            f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another output_dir"
        ) from error
    served = dummy_inputs(model, replace(settings, shapes="static"))  # the shape that it will serve
    try:
        difference = max(check_parity(model, path, each, recipe.benchmark.parity_atol) for each in (inputs, served))
    except ParityMismatch as error:
        path.unlink(missing_ok=True)
        raise ParityError(str(error)) from error
    state.progress.note(f"{name}: largest difference to torch {difference:.1e}")
