"""The tower beside the one that a recipe prunes, of the same checkpoint."""

from __future__ import annotations

from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures.towers import WHOLE
from ziplm_deploy.models.location import CONFIG_FILE, resolve_model_path
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.sentence_files import SentenceFiles
from ziplm_deploy.recipe import ModelConfig, TaskName


def partner_of(model: ModelConfig) -> ModelConfig:
    """Settings of the tower that reads images, beside one that reads texts, or the other way round.

    Raises:
        UnsupportedModelError: the checkpoint is no model of two towers, or one of them alone.
        CorruptArtifactError: it is damaged.
    """
    files = SentenceFiles(resolve_model_path(model.path), model.revision)
    model_type = files.mapping(CONFIG_FILE)[1].get("model_type")
    if model_type not in WHOLE:
        alone = any(model_type == tower for towers in WHOLE.values() for _, tower in towers.values())
        found = f"a {model_type} without its partner" if alone else f"a {model_type}"
        raise UnsupportedModelError(
            f"expected a checkpoint of both towers ({', '.join(WHOLE)}) in {model.path} for data.retrieval of captions "
            f"and images, one side of which the other tower embeds, found {found}; give the whole model"
        )
    task: TaskName = "sentence-similarity" if model.task == "image-feature-extraction" else "image-feature-extraction"
    return with_own_settings(ModelConfig(path=model.path, revision=model.revision, task=task))
