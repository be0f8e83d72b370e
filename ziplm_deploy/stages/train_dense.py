"""Fine-tuning of a base checkpoint: the dense model of a run whose user has no fine-tuned one."""

from __future__ import annotations

import shutil

from ziplm_deploy.machine import distributed
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.training import train
from ziplm_deploy.run.run import Run


def train_dense(state: Run) -> None:
    """Train the dense model in place for the task, and save it as an ordinary transformers checkpoint."""
    folder = state.folder.dense_checkpoint
    key = state.dense_key()

    def work() -> None:
        config, task = state.recipe.dense, state.task
        checkpoints = state.folder.path / "recovery" / f"dense-{key[:12]}"
        student = Student(state.dense, task, layers=[], dropout=True)
        seed, progress = state.recipe.seed, state.progress
        record = train(
            student, Objective(task), state.examples, config, checkpoints, seed=seed, progress=progress, title="dense"
        )
        state.dense.cpu()
        if not distributed.is_first():
            return
        making = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(making, ignore_errors=True)
        state.dense.save_pretrained(making, safe_serialization=True)  # type: ignore[operator]
        state.processor.save_pretrained(making)
        record.save(making / "training.json")
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
        shutil.rmtree(checkpoints.parent, ignore_errors=True)

    state.folder.stage("train dense", key, [folder / "config.json"], work, together=True)
