"""``model.onnx`` of every model, or ``model.gguf`` where llama.cpp serves, checked against torch.

The latter is compared with torch whose weights are rounded as its own; what rounding costs is for the scores to say.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.decoder_parts import AttentionPart
from exporters.files import temporary_name
from exporters.genai import CONFIG_NAME
from ziplm_deploy.artifacts import atomic_path, content_key
from ziplm_deploy.compression.treatment import target_treatment
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.errors import ParityError
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.deployed import PARITY_PROMPTS, other_form
from ziplm_deploy.models.gguf_export import rounded
from ziplm_deploy.models.member_files import load, renew_prompts, replace_member
from ziplm_deploy.recipe import GgufType, Variant
from ziplm_deploy.run import gguf
from ziplm_deploy.run.member import Member
from ziplm_deploy.run.run import Generation, Run
from ziplm_deploy.stages.stage import Stage

# Largest difference of a file's answers, as a fraction of the size of logits; missing layers make one as large as that.
# Activations of 8 bits, which go with quantized weights, made one of 11 % in SmolLM2.
GGUF_TOLERANCES: dict[GgufType, float] = {"F16": 0.1, "Q8_0": 0.5, "Q4_0": 0.5}


def export_generation(run: Run, generation: Generation) -> None:
    """Files of the dense model and of a generation's members as pruned."""
    export_dense(run)
    for member in generation.members:
        export_pruned(run, member)


def export_trained(run: Run) -> None:
    """Files of all members that were trained; the others have theirs already. All get the prompts of the recipe."""
    if run.trains:
        for member in run.pruned_members:
            export_member(run, member, member.folder)
    if distributed.is_first():
        renew_prompts([member.folder for member in run.members], run.recipe.model)


def export_dense(run: Run) -> None:
    """Checkpoint and exported file of the dense model."""
    member = run.dense_member
    path = member.as_exported.path

    def work() -> float | None:
        replace_member(member.folder, run.dense.model, run.dense.processor, run.recipe.model, {"member": member.name})
        return export_as_served(run, run.dense.model, path, member.name)

    make_checked(
        run, f"export {member.name}", export_key(run, run.dense.hash), [path, member.weights, member.folder], work
    )


def export_pruned(run: Run, member: Member) -> None:
    """File of a member as pruned and, where its target is of another variant, one as fast as that will be."""
    export_member(run, member, member.pruned_folder)
    if not run.recipe.target.is_exported:
        export_stand_in(run, member)


def export_member(run: Run, member: Member, folder: Path) -> None:
    """A member's exported file beside its weights; raises :class:`ParityError` if ONNX does not answer like torch."""
    path = folder / member.exported.file_name
    key = export_key(run, run.file_hash(folder / member.weights.name))
    stage = export_stage(member, folder)
    make_checked(run, stage, key, [path], lambda: export_as_served(run, load(folder), path, member.name))


def export_stage(member: Member, folder: Path) -> str:
    """Name of the stage that exports a member into one of its folders."""
    kinds = {member.folder: "export {}", member.sparse_folder: "export {} sparse"}
    return kinds.get(folder, "export pruned {}").format(member.name)


def export_key(run: Run, source: str) -> str:
    """Everything that an exported file depends on; ``source`` stands for the weights."""
    recipe, workload = run.recipe, run.recipe.environment.workload
    if recipe.environment.runs_gguf:
        return content_key(weights=source, type=recipe.export.gguf, name=recipe.name)
    # Not the shares of calls; files of causal language models take texts of any length.
    shape = {} if run.task.is_causal else {"batch_size": workload.batch_size, "seq_len": workload.seq_len}
    return content_key(
        source=source,
        model=run.model_settings,
        export=recipe.export.of_onnx,
        environment=shape,
        **other_form(run.dense.model, recipe.export, recipe.environment),
    )


def make_checked(run: Run, stage: str, key: str, outputs: list[Path], work: Callable[[], float | None]) -> None:
    """Make a stage whose ``work`` exports a file and returns how far it is from torch, None where that says nothing;
    raises :class:`ParityError`."""

    def checked() -> None:
        difference = work()
        if difference is not None:
            run.folder.set_difference(stage, difference)

    run.folder.make(stage, key, outputs, checked)
    check_difference(run, stage)


def check_difference(run: Run, stage: str) -> None:
    """Refuse a file that was made when the recipe allowed a larger difference to torch; no key holds that limit."""
    found, allowed = run.folder.difference(stage), run.recipe.parity_atol
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


def export_as_served(run: Run, model: nn.Module, path: Path, title: str) -> float | None:
    """Export ``model`` as what its engine runs, checked: how far ONNX is from torch, or None for GGUF.

    Raises:
        ParityError: the file answers otherwise than torch; it is removed.
    """
    if not run.recipe.environment.runs_gguf:
        (path.parent / CONFIG_NAME).unlink(missing_ok=True)  # of the file before; export.genai writes it anew
        if run.task.is_causal and not run.recipe.export.stock_optimum and not fits_stock_optimum(model):
            run.progress.note(
                f"{title}: stock ORTModelForCausalLM cannot load {path.name}, whose caches have other heads than "
                "config.json says; export.stock_optimum: true writes one that it can"
            )
        return export_checked(run, model, path, title)
    export_gguf(run, model, path, title)
    check_gguf(run, model, path, title)
    return None


def fits_stock_optimum(model: nn.Module) -> bool:
    """Whether every cache is one that stock optimum starts with: heads, and their width, of ``config.json``.

    Layers without attention have none, and it asks for none.
    """
    config: Any = model.config
    n_heads = config.num_attention_heads
    expected = (getattr(config, "num_key_value_heads", n_heads), config.hidden_size // n_heads)
    attentions = (layer.attention for layer in causal_parts(model).layers)
    kept = [each for each in attentions if isinstance(each, AttentionPart)]
    return all((each.n_kv_heads, each.head_dim) == expected for each in kept)


def check_gguf(run: Run, model: nn.Module, path: Path, title: str) -> None:
    """Compare a GGUF file with torch as llama.cpp answers, and say how far it is.

    Raises:
        EngineError: llama.cpp is missing.  ParityError: the file answers otherwise; it is removed.
    """
    difference = gguf_difference(run, model, path)
    run.progress.note(f"{title}: {100 * difference:.2g} % from torch with the same rounded weights")
    allowed = GGUF_TOLERANCES[run.gguf_export.file_type]
    if not difference <= allowed:  # NaN, too
        path.unlink()
        raise ParityError(
            f"expected {title} as GGUF to answer in llama.cpp within {100 * allowed:g} % of torch with the same "
            f"rounded weights, found {100 * difference:.3g} %; report the model"
        )


def gguf_difference(run: Run, model: nn.Module, path: Path) -> float:
    """How far the answers of a GGUF file are from those of torch whose weights are rounded as the file's.

    What is left are llama.cpp's activations and caches, of 8 or 16 bits. Root mean square of the difference of logits
    on random prompts, over that of the logits; a constant on all logits of a token changes no probability.
    """
    exact = rounded(model, run.gguf_export.file_type).eval()
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    generator = torch.Generator().manual_seed(0)
    differences, sizes = [], []
    workload = run.recipe.environment.workload.model_copy(update={"batch_size": 1})  # it reads one text at a time
    in_llama_cpp = run.recipe.environment.model_copy(update={"engine": gguf.ENGINE, "workload": workload})
    with open_runner(in_llama_cpp, path) as answer, torch.no_grad():
        for length in PARITY_PROMPTS:
            ids = torch.randint(0, vocabulary, (1, length), generator=generator)
            expected = exact(input_ids=ids, use_cache=False).logits[0].numpy()  # [tokens, vocabulary]
            found = answer({"input_ids": ids.numpy(), "attention_mask": np.ones((1, length), np.int64)})["logits"][0]
            found, expected = (each - each.mean(axis=1, keepdims=True) for each in (found, expected))
            differences.append(np.square(found - expected).mean())
            sizes.append(np.square(expected).mean())
    return float(np.sqrt(np.mean(differences) / np.mean(sizes)))


def export_gguf(run: Run, model: nn.Module, path: Path, title: str) -> None:
    """Export ``model`` as GGUF; a note says which weights have another type than asked for."""
    kept = run.gguf_export.write(model, path, title)
    if kept:
        run.progress.note(f"{title}: {len(kept)} tensors of {path.name} stay in float16: rows of odd widths")


def export_stand_in(run: Run, member: Member) -> None:
    """A file as fast as a pruned member will be in the target's variant, which does not exist before it is trained."""
    recipe, treatment = run.recipe, target_treatment(run.recipe)
    assert treatment is not None
    path = member.stand_in(recipe.target)
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
    if run.recipe.environment.runs_gguf:
        run.gguf_export.write_to_be_timed(model, path, name)
        return
    treatment = target_treatment(run.recipe)
    if treatment is None:
        run.onnx_export.write_to_be_timed(model, path, name)
        return
    scratch = temporary_name(path)
    made = scratch / Variant.FP32.file_name
    try:
        model = treatment.prepare(model)
        _, inputs = run.onnx_export.write_to_be_timed(model, made, name)
        treatment.finish(made, inputs)
        with atomic_path(path) as temporary:
            shutil.copyfile(made, temporary)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _what(run: Run) -> str:
    return f"{'GGUF' if run.recipe.environment.runs_gguf else 'ONNX'} files, checked against torch"


PRUNED = Stage("export", lambda run, generation: _what(run), export_generation)
TRAINED = Stage(
    "export",
    lambda run: f"the trained models as {_what(run)}",
    export_trained,
    shown=lambda recipe: recipe.recover.mode != "none",
)
