"""Have the dense model write text, where the recipe wants it for calibration and training in place of data."""

from __future__ import annotations

import shutil

from ziplm_deploy.artifacts import atomic_folder
from ziplm_deploy.recovery.self_data import TextSampler
from ziplm_deploy.run.data import SAMPLING
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.data_notes import leave_data_notes
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.tasks.generation import window_tokens


def sample_texts(run: Run) -> None:
    """Texts sampled from the dense model, enough for the windows that the recipe asks for."""
    config = run.recipe.data.generated
    if config is None:
        return
    key = run.data.sampling_key

    def work() -> None:
        context = window_tokens(run.recipe.data, run.dense.processor)
        sampler = TextSampler(run.dense.model, run.dense.processor, config, context)
        texts = sampler.sample(run.recipe.seed, run.folder.sampling(key), run.progress)
        with atomic_folder(run.folder.sampled_texts) as making:
            shutil.copytree(run.folder.sampling(key), making, dirs_exist_ok=True)
        run.progress.note(
            f"sampled {len(texts.ids):,} texts with {texts.n_tokens:,} tokens from the dense model, "
            f"{texts.n_tokens / texts.seconds:.0f} tokens a second"
        )

    run.folder.make(SAMPLING, key, [run.folder.sampled_texts], work)
    run.folder.drop_samplings()
    leave_data_notes(run)


STAGE = Stage(
    "sample texts",
    lambda run: f"plain text from {run.recipe.model.path} in place of data",
    sample_texts,
    shown=lambda recipe: recipe.data.generated is not None,
)
