"""The task's metric of an ONNX file, run by the engine that will serve it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine import usable_cores
from ziplm_deploy.run import BATCH_SIZE, DENSE, Run
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


def evaluate_member(state: Run, name: str) -> None:
    """Write ``accuracy.json`` into the member's folder; fidelity to the dense file too, where the task has it."""
    folder, recipe = state.folder.member(name), state.recipe
    dense_path = state.folder.member(DENSE) / "model.onnx"
    key = content_key(
        file=state.file_hash(folder / "model.onnx"),
        dense=state.file_hash(dense_path),
        data=state.evaluation_hash,
        columns=recipe.data.model_dump(exclude={"calibration", "evaluation", "calibration_split", "n_calibration"}),
        model=state.model_settings,
        seed=recipe.seed,
        seq_len=recipe.environment.seq_len,
    )

    def work() -> None:
        static = recipe.export.shapes == "static"
        seq_len = recipe.environment.seq_len
        batch_size = recipe.environment.batch_size if static else BATCH_SIZE
        arguments = (state.evaluation_rows, state.processor, seq_len, batch_size, seq_len if static else None)
        run = onnx_runner(folder / "model.onnx")
        scores = state.task.evaluate(run, *arguments)
        if name != DENSE:
            scores |= state.task.fidelity(run, onnx_runner(dense_path), *arguments)
        write_text(folder / ACCURACY_FILE, json.dumps(scores, indent=1) + "\n")

    state.folder.stage(f"evaluate {name}", key, [folder / ACCURACY_FILE], work)


def member_accuracy(state: Run, name: str) -> dict[str, float]:
    """Scores of a member, the primary metric first; empty when they were not evaluated."""
    path = state.folder.member(name) / ACCURACY_FILE
    if state.recipe.data.evaluation is None or not path.exists():
        return {}
    scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores
