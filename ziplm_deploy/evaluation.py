"""The task's metric of an ONNX file, run by the engine that will serve it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.config import Environment
from ziplm_deploy.engines import WorkerOptions, get_engine
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine import usable_cores
from ziplm_deploy.parents import DENSE
from ziplm_deploy.run import BATCH_SIZE, Run
from ziplm_deploy.run_folder import content_key
from ziplm_deploy.tasks import Run as Runner

ACCURACY_FILE = "accuracy.json"


def onnx_runner(path: Path) -> Runner:
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
def open_runner(environment: Environment, path: Path) -> Iterator[Runner]:
    """The file as a function, run by the engine that will serve it; ONNX Runtime needs no process of its own for that.

    Raises:
        EngineError: the engine is missing, or rejects the file.
    """
    if environment.engine == "onnxruntime":
        yield onnx_runner(path)
        return
    options = WorkerOptions(usable_cores(), environment.batch_size, environment.seq_len)
    with get_engine(environment.engine).start_worker(options) as worker:
        wanted = {entry.name for entry in worker.load("model", path).inputs}

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return worker.infer("model", {name: value for name, value in inputs.items() if name in wanted})

        yield run


def remembering(run: Runner) -> Runner:
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


def evaluate_member(state: Run, name: str, folder: Path, dense_run: Runner) -> None:
    """Write ``accuracy.json`` into a member's folder; fidelity to the dense file too, where the task has it."""
    recipe = state.recipe
    dense_path = state.folder.member(DENSE) / "model.onnx"
    key = content_key(
        file=state.file_hash(folder / "model.onnx"),
        dense=state.file_hash(dense_path),
        engine=recipe.environment.engine,
        data=state.evaluation_hash,
        columns=recipe.data.model_dump(
            include={"evaluation_split", "config_name", "text_columns", "label_column", "n_evaluation"}
        ),
        model=state.model_settings,
        seed=recipe.seed,
        seq_len=recipe.environment.seq_len,
    )

    def work() -> None:
        static = recipe.export.shapes == "static"
        seq_len = recipe.environment.seq_len
        batch_size = recipe.environment.batch_size if static else BATCH_SIZE
        arguments = (state.evaluation_rows, state.processor, seq_len, batch_size, seq_len if static else None)
        if name == DENSE:
            scores = state.task.evaluate(dense_run, *arguments)
        else:
            with open_runner(recipe.environment, folder / "model.onnx") as runner:
                run = remembering(runner)
                scores = state.task.evaluate(run, *arguments) | state.task.fidelity(run, dense_run, *arguments)
        write_text(folder / ACCURACY_FILE, json.dumps(scores, indent=1) + "\n")

    stage = f"evaluate {name}" if folder == state.folder.member(name) else f"evaluate pruned {name}"
    state.folder.stage(stage, key, [folder / ACCURACY_FILE], work)


def accuracy_in(state: Run, folder: Path) -> dict[str, float]:
    """Scores of the ONNX file in a folder, the primary metric first; empty when they were not evaluated."""
    path = folder / ACCURACY_FILE
    if state.recipe.data.evaluation is None or not path.exists():
        return {}
    scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores
