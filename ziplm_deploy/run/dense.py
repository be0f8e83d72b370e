"""The dense model of a run: the recipe's checkpoint, or what the run has trained from it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ziplm_deploy.artifacts import content_key, file_hash, source_hash
from ziplm_deploy.documents import read_json
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.gguf_source import model_place
from ziplm_deploy.models.location import hub_version, transformer_place
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.models.shape import ModelShape
from ziplm_deploy.recipe import Recipe
from ziplm_deploy.run.folder import RunFolder

_OF_PROCESSORS = {".json", ".model", ".txt"}
_NOT_OF_PROCESSORS = {"config.json", "generation_config.json", "model.safetensors.index.json"}


def model_hash(path: str, revision: str | None = None) -> str:
    """Stands for the weights of a model: content of a folder, commit of a hub id, which may change there."""
    place = model_place(path)
    version = hub_version(place, revision) or revision
    return source_hash(place) + (f"@{version}" if version else "")


class DenseModel:
    """Model and processor, loaded on first use.

    ``training_key`` gives what a dense model trained by this run depends on, ``head_settings`` the settings of the head
    that it starts with.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        training_key: Callable[[str], str],
        head_settings: Callable[[], dict[str, Any]],
        transformer: str,  # sub-folder with model and tokenizer
    ) -> None:
        self._recipe, self._folder = recipe, folder
        self._training_key, self._head_settings, self._transformer = training_key, head_settings, transformer
        self.base_hash = model_hash(recipe.model.path, recipe.model.revision)

    @functools.cached_property
    def input_key(self) -> str:
        """Stands for what the model makes of data: tokenizer or image processor, and the names of its classes.

        Weights do not count: results that hold for any of them stay where only these change.
        """
        folder = Path(model_place(self._recipe.model.path))
        if not os.path.isdir(folder):
            return self.base_hash
        places = {folder, Path(transformer_place(str(folder), self._transformer))}
        found = {file for place in places for file in place.glob("*")}
        files = [file for file in sorted(found) if file.suffix in _OF_PROCESSORS and file.is_file()]
        files = [file for file in files if file.name not in _NOT_OF_PROCESSORS]
        hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in files}
        try:
            config = read_json(folder / "config.json")
        except (OSError, ValueError):  # refused with its reason when the model is loaded
            config = {}
        classes = {name: config.get(name) for name in ("id2label", "label2id")} if isinstance(config, dict) else {}
        return content_key(processor=hashes, classes=classes)

    @property
    def training_key(self) -> str:
        """Everything that a dense model trained by this run depends on."""
        return self._training_key(self.base_hash)

    @property
    def hash(self) -> str:
        """Stands for the dense model's weights."""
        return self.training_key if self._recipe.dense.train else self.base_hash

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        recipe, folder = self._recipe, self._folder
        if not recipe.dense.train:
            return load_dense(recipe.model)
        if folder.is_made("train dense", self.training_key) and folder.dense_checkpoint.is_dir():
            elsewhere = {"path": str(folder.dense_checkpoint), "revision": None, "answer_tokens": None}
            trained = recipe.model.model_copy(update=elsewhere)
            return load_dense(trained)
        with torch.random.fork_rng():  # a new head starts from the recipe's seed
            torch.manual_seed(recipe.seed)
            return load_dense(recipe.model, self._head_settings())

    @property
    def model(self) -> nn.Module:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        """Tokenizer or image processor."""
        return self._loaded[1]

    @functools.cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.model.config)  # type: ignore[arg-type]
