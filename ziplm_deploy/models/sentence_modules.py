"""What a sentence-transformers model says about itself: pooling, Dense layers, normalization, lengths, prompts.

Files of every age are read, of folders and hub ids alike; what cannot be reproduced is refused by name. A model without
``modules.json`` is a plain transformers model, which says nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ziplm_deploy.documents import shortened
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.config_file import refuse_own_code
from ziplm_deploy.models.cross_encoder_modules import read_activation, read_cross_encoder
from ziplm_deploy.models.location import CONFIG_FILE, find_file, resolve_model_path
from ziplm_deploy.models.sentence_fields import (
    dense_layer,
    module_list,
    with_pooling,
    with_prompts,
    with_texts,
)
from ziplm_deploy.models.sentence_files import (
    MODULES_FILE,
    POOLING_FILE,
    SETTINGS_FILE,
    SentenceFiles,
    check_neutral,
    damaged,
)
from ziplm_deploy.models.sentence_record import SentenceModules
from ziplm_deploy.models.tower_heads import tower_head
from ziplm_deploy.models.two_towers import Reads
from ziplm_deploy.recipe import ModelConfig

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20
_DIMENSIONS = re.compile(r'"?matryoshka_dim(?:ension)?s"?\s*[:=]\s*\[([\d,\s]{1,400})\]')
# Fields of modules that change what they answer, and the values with which they do not.
_PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": ({"text": _PLAIN_TEXT},),
    **dict.fromkeys(("processing_kwargs", "processor_kwargs", "tokenizer_args", "config_kwargs", "config_args"), ({},)),
    **dict.fromkeys(("query_expansion", "query_length", "document_length"), ()),
}
_ON_EMBEDDINGS: dict[str, tuple[Any, ...]] = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding",),
    "use_residual": (False,),
}


def read_sentence_modules(model: ModelConfig) -> SentenceModules:
    """What a model of embeddings, or a cross-encoder, says about itself; models for other tasks say nothing.

    Raises:
        UnsupportedModelError: it has a module, a pooling or a setting that cannot be reproduced.
        CorruptArtifactError: a file is damaged.
    """
    if model.task not in ("sentence-similarity", "image-feature-extraction", "reranking", "text-regression"):
        return SentenceModules()
    files = SentenceFiles(resolve_model_path(model.path), model.revision)
    if model.task == "text-regression":
        return read_activation(files) if model.score_activation is None else SentenceModules()
    if model.task == "reranking":
        return read_cross_encoder(files)
    # Towers of images never needed that file, so that caches may not say whether there is one.
    modules = files.read(MODULES_FILE, must_know=model.task != "image-feature-extraction")
    _refuse_clip_module(modules, files.path)
    if model.task == "image-feature-extraction":
        return _tower_modules(files, "image")
    if modules is not None:
        return _read_modules(files, modules)
    # sentence-transformers would not look at a pooling alone, but somebody has put it there.
    pooling = files.read(POOLING_FILE) if Path(files.path).is_dir() else None
    if pooling is not None:
        return with_pooling(SentenceModules(files.path), POOLING_FILE, pooling)
    return _tower_modules(files, "text")


def _refuse_clip_module(modules: Any, path: str) -> None:
    """Refuse CLIP as a module of sentence-transformers: its files lie deeper, and would be read without their heads."""
    listed = modules if isinstance(modules, list) else []  # else it is damaged, which is found where it is read
    kinds = {str(each.get("type")): each.get("path") for each in listed if isinstance(each, dict)}
    folder = next((place for kind, place in kinds.items() if kind.endswith(".CLIPModel")), None)
    if folder:
        raise UnsupportedModelError(
            f"expected a checkpoint of CLIP as transformers saves it, found one inside of {path} as a module of "
            f"sentence-transformers (CLIPModel); give that folder as model.path, of a local copy: {path}/{folder}"
        )


def _tower_modules(files: SentenceFiles, reads: Reads) -> SentenceModules:
    """What is known of towers of CLIP and SigLIP, whose files say nothing; nothing of other models."""
    try:
        head = tower_head(files.config(), reads)
    except ValidationError as error:
        raise damaged(f"{files.path}/{CONFIG_FILE}", error) from error
    if head is None:
        return SentenceModules()
    return SentenceModules(files.path, pooling=head.pooling, dense=head.dense, is_tower=True)


def _read_modules(files: SentenceFiles, raw: Any) -> SentenceModules:
    where = f"{files.path}/{MODULES_FILE}"
    refuse_own_code(files.config(), files.path)  # its modules may be of that code, too
    modules = module_list(raw, where)
    kinds = [kind for _, kind in modules]
    usual = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense")]
    if kinds not in (usual, [*usual, "Normalize"]):
        raise UnsupportedModelError(
            f"expected Transformer, Pooling, then any Dense layers and at most one Normalize in {where}, found "
            f"{shortened(', '.join(kinds)) or 'no modules'}; choose another model"
        )
    found = SentenceModules(files.path, normalize="Normalize" in kinds, transformer=modules[0][0].path)
    found = with_prompts(with_texts(found, files, _NEUTRAL), files)
    for module, kind in modules[1:]:
        name, fields = files.mapping(f"{module.path}/config.json")
        if kind == "Pooling":
            if not fields:
                raise damaged(f"{files.path}/{name}", "no pooling")
            found = with_pooling(found, name, fields)
            continue
        check_neutral(fields, _ON_EMBEDDINGS, f"{files.path}/{name}")
        if kind == "Dense":
            layer = dense_layer(fields, f"{files.path}/{name}")
            found = replace(found, dense=(*found.dense, layer), dense_folders=(*found.dense_folders, module.path))
    return replace(found, dimensions=_dimensions(found, files))


def _dimensions(found: SentenceModules, files: SentenceFiles) -> tuple[int, ...] | None:
    """Sizes that a model was trained to be cut to, from the first file that lists them: settings, or its model card.

    No release of sentence-transformers has a field for all of them; its cards show the settings of the loss.
    """
    size = found.dense[-1].out_features if found.dense else found.width
    config = f"{found.transformer}/config.json" if found.transformer else "config.json"
    for name in (SETTINGS_FILE, config, CARD_FILE):
        file = find_file(files.path, name, files.revision)
        text = "" if file is None else file.read_bytes()[:MAX_CARD_BYTES].decode("utf-8", "replace")
        listed = _DIMENSIONS.search(text)
        if listed is not None:
            sizes = {int(each) for each in re.findall(r"\b\d{1,6}\b", listed[1])}
            return tuple(sorted(each for each in sizes if 0 < each <= (size or each))) or None
    return None
