"""The task's metric of an ONNX file, run by the engine that will serve it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

from ziplm_deploy.artifacts import content_key, write_text
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.recipe import EngineName, Environment, Recipe, Variant, file_label
from ziplm_deploy.run.run import Run
from ziplm_deploy.tasks import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.evaluation_set import BATCH_SIZE, cache_embeddings


def onnx_runner(path: Path) -> ModelFunction:
    """A function from named inputs to named outputs; inputs that the graph does not take are left out.

    Raises:
        EngineError: ONNX Runtime rejects the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        raise EngineError(
            f"expected a model that ONNX Runtime runs in {path}, found: {error}; export it again"
        ) from error
    wanted = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
        return dict(zip(names, outputs, strict=True))

    return run


@contextlib.contextmanager
def open_runner(environment: Environment, path: Path) -> Iterator[ModelFunction]:
    """The file as a function, run by the engine that will serve it; ONNX Runtime needs no process of its own for that.

    Raises:
        EngineError: the engine is missing, or rejects the file.
    """
    if environment.engine == "onnxruntime":
        yield onnx_runner(path)
        return
    options = WorkerOptions(usable_cores(), environment.workload.batch_size, environment.workload.seq_len)
    with get_engine(environment.engine).start_worker(options) as worker:
        wanted = {entry.name for entry in worker.load("model", path).inputs}

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return worker.infer("model", {name: value for name, value in inputs.items() if name in wanted})

        yield run


def evaluate_member(
    state: Run, name: str, folder: Path, dense_run: ModelFunction, variant: Variant = Variant.FP32
) -> None:
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
        data = _evaluation_set(state, batch_size)
        if is_baseline:
            scores = state.task.evaluate(dense_run, data)
        else:
            with open_runner(recipe.environment, path) as runner:
                run = cache_embeddings(runner)
                scores = state.task.evaluate(run, data) | state.task.fidelity(run, dense_run, data)
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
        data = _evaluation_set(state, evaluation_batch_size(state.recipe, variant))
        return state.task.evaluate(run, data)[state.task.metric_name]


def _evaluation_set(state: Run, batch_size: int) -> EvaluationSet:
    """The evaluation rows in batches of the shape that the ONNX files take."""
    seq_len = state.recipe.environment.workload.seq_len
    pad_to = seq_len if state.recipe.export.shapes == "static" else None
    return EvaluationSet(state.evaluation_rows, state.processor, seq_len, batch_size, pad_to)


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
