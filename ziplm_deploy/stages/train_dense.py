"""Fine-tune the recipe's base checkpoint for its task: the dense model of a run whose user has no fine-tuned one."""

from __future__ import annotations

from ziplm_deploy.artifacts import atomic_folder
from ziplm_deploy.machine import distributed
from ziplm_deploy.models.dense import quiet_transformers
from ziplm_deploy.recovery.objective import Objective, Student
from ziplm_deploy.recovery.training import train
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.stage import Stage

CHECKPOINTS = "dense"


def train_dense(run: Run) -> None:
    """Train the dense model in place, and save it as an ordinary transformers checkpoint."""
    if not run.recipe.dense.train:
        return
    folder, key = run.folder.dense_checkpoint, run.dense.training_key
    run.folder.make("train dense", key, [folder / "config.json", folder], lambda: _train(run, key), together=True)
    run.folder.drop_checkpoints(CHECKPOINTS)


def _train(run: Run, key: str) -> None:
    folder, model = run.folder.dense_checkpoint, run.dense.model
    checkpoints = run.folder.checkpoints(CHECKPOINTS, key)
    record = train(
        Student(model, run.task, layers=[], dropout=True),
        Objective(run.task),
        run.data.examples,
        run.recipe.dense,
        checkpoints,
        seed=run.recipe.seed,
        progress=run.progress,
        title="dense",
    )
    model.cpu()
    if not distributed.is_first():
        return
    with atomic_folder(folder) as making:
        with quiet_transformers():
            model.save_pretrained(making)  # type: ignore[operator]
        run.dense.processor.save_pretrained(making)
        record.save(making / "training.json")


STAGE = Stage(
    "train dense",
    lambda run: f"{run.recipe.model.path} for {run.recipe.model.task}",
    train_dense,
    shown=lambda recipe: recipe.dense.train,
)
