"""A member's folder as sentence-transformers opens it with its ONNX back end, for the same embeddings of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.models.sentence_dense import embedding_size, layers_of_dense, write_folders
from ziplm_deploy.models.sentence_fields import POOLING_FLAGS
from ziplm_deploy.models.sentence_files import (
    LENGTH_FILES,
    MODULES_FILE,
    POOLING_FILE,
    SETTINGS_FILE,
    TORCH_ARGUMENTS,
    SentenceFiles,
    length_files,
)
from ziplm_deploy.models.sentence_record import SentenceModules
from ziplm_deploy.recipe import ModelConfig


def write_sentence_files(folder: Path, model: nn.Module, settings: ModelConfig, own: SentenceModules) -> None:
    """Write modules, Dense layers, lengths, prompts and similarity beside a member's weights.

    ``settings`` are complete; what the model's own files say beside what is read here is copied: sizes that embeddings
    may be cut to, versions, names of other prompts.

    Raises:
        StorageError: a file cannot be written.  UnsupportedModelError, CorruptArtifactError: the model's own files are
            gone.
    """
    dense = write_folders(model, folder, first=2)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *((path, "Dense") for path in dense)]
    if settings.normalize:
        kinds.append((f"{len(kinds)}_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    _write(folder / MODULES_FILE, modules)
    layers = layers_of_dense(model)
    width = layers[0].in_features if layers else embedding_size(model)
    known = ("cls", "mean", "max", "mean_sqrt_len_tokens", settings.pooling)  # readers without defaults want all four
    flags = {flag: settings.pooling == mode for flag, mode in POOLING_FLAGS.items() if mode in known}
    _write(folder / POOLING_FILE, {"word_embedding_dimension": width, **flags, "include_prompt": own.include_prompt})
    if own.source:
        files = SentenceFiles(resolve_model_path(settings.path), settings.revision)
        texts, whole = files.mapping(*length_files(own.transformer))[1], files.mapping(SETTINGS_FILE)[1]
    else:
        texts, whole = {}, {}
    texts = {name: value for name, value in texts.items() if name not in TORCH_ARGUMENTS}
    if texts:
        _write(folder / LENGTH_FILES[0], texts)
    _write_settings(folder, whole, settings, own)


def renew_settings(folder: Path, settings: ModelConfig, own: SentenceModules) -> None:
    """Write prompts and similarity anew beside a member that was written under other ones; arguments as above."""
    files = SentenceFiles(resolve_model_path(settings.path), settings.revision)
    _write_settings(folder, files.mapping(SETTINGS_FILE)[1] if own.source else {}, settings, own)


def _write_settings(folder: Path, whole: dict[str, Any], settings: ModelConfig, own: SentenceModules) -> None:
    path, content = folder / SETTINGS_FILE, _with_settings(whole, settings, own)
    if content:
        _write(path, content)
    else:
        path.unlink(missing_ok=True)


def _with_settings(whole: dict[str, Any], settings: ModelConfig, own: SentenceModules) -> dict[str, Any]:
    """Settings of the whole model with the prompts and the similarity that the member was judged with."""
    prompts = dict(whole.get("prompts") or {})
    names = [name for name, text in prompts.items() if text == settings.prompt]
    default = whole.get("default_prompt_name")
    changes: dict[str, Any] = {}
    if settings.prompt and default not in names:
        name = names[0] if names else "default"
        changes |= {"prompts": {**prompts, name: settings.prompt}, "default_prompt_name": name}
    elif not settings.prompt and default is not None and prompts.get(default):
        changes["default_prompt_name"] = None
    asked = {"query": settings.prompt_of_queries, "document": settings.prompt_of_passages}
    # Also where the files say passage or corpus: encode_document() looks for document, which it always finds.
    others = {name: text for name, text in asked.items() if text != (prompts.get(name) or "")}
    if others:
        changes["prompts"] = {**changes.get("prompts", prompts), **others}
    if settings.similarity != "cosine" or whole.get("similarity_fn_name"):
        changes["similarity_fn_name"] = settings.similarity
    return {**whole, **changes}


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
