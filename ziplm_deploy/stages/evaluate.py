"""The task's metric of an ONNX file, run by the engine that will serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ziplm_deploy.artifacts import content_key, write_text
from ziplm_deploy.engines.runner import open_runner
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.recipe import EngineName, Recipe, Variant, file_label
from ziplm_deploy.run.run import BATCH_SIZE, Run
from ziplm_deploy.tasks import Run as Runner


def cache_embeddings(run: Runner) -> Runner:
    """The same answers; sentence embeddings, which metric and fidelity both read, are computed once a batch."""
    known: dict[bytes, dict[str, np.ndarray]] = {}

    def remembered(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = b"".join(inputs[name].tobytes() for name in sorted(inputs))
        if key in known:
            return known[key]
        outputs = run(inputs)
        if "sentence_embedding" in outputs:  # other outputs may be vocabulary-wide
            known[key] = {"sentence_embedding": outputs["sentence_embedding"]}
        return outputs

    return remembered


def evaluate_member(state: Run, name: str, folder: Path, dense_run: Runner, variant: Variant = Variant.FP32) -> None:
    """Write ``accuracy.json`` (or a variant's) into a member's folder; fidelity to the dense file too, where there is.

    ``dense_run``: the dense model in the engine of the baseline.
    """
    recipe = state.recipe
    path, target = folder / variant.onnx_file, folder / variant.accuracy_file
    is_baseline = name == DENSE and variant is Variant.FP32
    batch_size = evaluation_batch_size(recipe, variant)
    key = content_key(
        file=state.file_hash(path),
        dense=state.file_hash(state.folder.member(DENSE) / "model.onnx"),
        engines=state.engine_versions,
        batch_size=batch_size,
        data=state.evaluation_key,
    )

    def work() -> None:
        arguments = _arguments(state, batch_size)
        if is_baseline:
            scores = state.task.evaluate(dense_run, *arguments)
        else:
            with open_runner(recipe.environment, path) as runner:
                run = cache_embeddings(runner)
                scores = state.task.evaluate(run, *arguments) | state.task.fidelity(run, dense_run, *arguments)
        write_text(target, json.dumps(scores, indent=1) + "\n")

    what = file_label(name, variant)
    stage = f"evaluate {what}" if folder == state.folder.member(name) else f"evaluate pruned {what}"
    state.folder.stage(stage, key, [target], work)


def score_of(state: Run, path: Path, variant: Variant, engine: EngineName | None = None) -> float:
    """The task's primary metric of an ONNX file of this form; ``engine``: another one than that of the environment."""
    environment = state.recipe.environment
    if engine is not None:
        environment = environment.model_copy(update={"engine": engine})
    with open_runner(environment, path) as run:
        arguments = _arguments(state, evaluation_batch_size(state.recipe, variant))
        return state.task.evaluate(run, *arguments)[state.task.metric_name]


def _arguments(state: Run, batch_size: int) -> tuple[list[dict[str, Any]], Any, int, int, int | None]:
    """What tasks evaluate on: rows, processor, tokens, examples in a call, and to how many tokens they are padded."""
    seq_len = state.recipe.environment.workload.seq_len
    pad_to = seq_len if state.recipe.export.shapes == "static" else None
    return state.evaluation_rows, state.processor, seq_len, batch_size, pad_to


def evaluation_batch_size(recipe: Recipe, variant: Variant) -> int:
    """Examples in a call: as served where the answers depend on it, which they do if a scale spans the whole batch."""
    as_served = recipe.export.shapes == "static" or (variant.is_int8 and recipe.compress.int8.method == "dynamic")
    return recipe.environment.workload.batch_size if as_served else BATCH_SIZE


def accuracy_in(state: Run, folder: Path, variant: Variant = Variant.FP32) -> dict[str, float]:
    """Scores of an ONNX file in a folder, the primary metric first; empty when they were not evaluated."""
    path = folder / variant.accuracy_file
    if state.recipe.data.evaluation is None or not path.exists():
        return {}
    scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores
