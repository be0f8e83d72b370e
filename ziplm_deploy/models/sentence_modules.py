"""What a sentence-transformers model says about itself: pooling, Dense layers, normalization, lengths, prompts.

Files of every age are read, of folders and hub ids alike; what cannot be reproduced is refused by name. A model without
``modules.json`` is a plain transformers model, which says nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, ValidationError

from ziplm_deploy.documents import shortened, shown
from ziplm_deploy.errors import CorruptArtifactError, RecipeError, UnsupportedModelError
from ziplm_deploy.models.architectures import ARCHITECTURES
from ziplm_deploy.models.location import CONFIG_FILE, find_file, resolve_model_path
from ziplm_deploy.models.score_activation import read_score_activation
from ziplm_deploy.models.sentence_dense import ACTIVATIONS, DenseLayer
from ziplm_deploy.models.sentence_files import Fields, SentenceFiles, check_neutral, checked, damaged
from ziplm_deploy.models.tower_heads import tower_head
from ziplm_deploy.models.two_towers import Reads
from ziplm_deploy.recipe import ModelConfig, Pooling, Similarity

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
SETTINGS_FILE = "config_sentence_transformers.json"
CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20
_DIMENSIONS = re.compile(r'"?matryoshka_dim(?:ension)?s"?\s*:\s*\[([\d,\s]{1,400})\]')
# One name a family of models in old releases; all have the same fields.
LENGTH_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Before release 5.4 each pooling had a flag, since then there is one name.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the first that there is, as encode_document does
_POOLINGS = ("mean", "cls", "max", "lasttoken")
_SIMILARITIES: dict[str, Similarity] = {
    **{"cosine": "cosine", "cos_sim": "cosine", "dot": "dot", "dot_score": "dot", "dot_product": "dot"},
    **{"euclidean": "euclidean", "manhattan": "manhattan"},
}
# Fields of modules that change what they answer, and the values with which they do not.
_PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": ({"text": _PLAIN_TEXT},),
    **dict.fromkeys(("processing_kwargs", "processor_kwargs", "tokenizer_args", "config_kwargs", "config_args"), ({},)),
    **dict.fromkeys(("query_expansion", "query_length", "document_length"), ()),
}
_PAIR_LOGITS = {"method": "forward", "method_output_name": "logits"}
_OF_PAIRS = _NEUTRAL | {
    "transformer_task": ("sequence-classification",),
    "module_output_name": ("scores",),
    "modality_config": ({"text": _PAIR_LOGITS},),
}
_ON_EMBEDDINGS: dict[str, tuple[Any, ...]] = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding",),
    "use_residual": (False,),
}


class _Module(Fields):
    path: str
    type: str


class _Lengths(Fields):
    max_seq_length: int | None = Field(None, ge=1)
    do_lower_case: bool = False


class _Pooling(Fields):
    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True
    word_embedding_dimension: int | None = None
    embedding_dimension: int | None = None


class _Dense(Fields):
    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"


class _Settings(Fields):
    truncate_dim: Annotated[int, Field(ge=1)] | None = None
    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None


@dataclass(frozen=True)
class SentenceModules:
    """What a model says; None where it does not."""

    source: str = ""  # folder or hub id, for messages
    pooling: Pooling | None = None
    normalize: bool | None = None
    prompt: str | None = None  # put before every text by default
    query_prompt: str | None = None  # put before queries, and the next before passages
    passage_prompt: str | None = None
    dimensions: tuple[int, ...] | None = None  # sizes that embeddings may be cut to
    similarity: Similarity | None = None
    include_prompt: bool = True  # whether the tokens of a prompt are pooled, too
    transformer: str = ""  # sub-folder of the transformers model: old ones have it in 0_Transformer
    width: int | None = None  # of the vectors that are pooled
    dense: tuple[DenseLayer, ...] = ()  # after pooling
    dense_folders: tuple[str, ...] = ()  # where their weights are
    max_seq_length: int | None = None  # tokens
    do_lower_case: bool = False
    activation: str | None = None  # over the score of a cross-encoder; full name of a class of torch
    is_tower: bool = False  # of CLIP or SigLIP: a projection has its weights in the model's own file

    def answers(self, seq_len: int) -> dict[str, Any]:
        """What changes answers beside the settings of the recipe, for content keys; empty for a plain model."""
        found: dict[str, Any] = {}
        if self.max_seq_length is not None and self.max_seq_length < seq_len:
            found["max_seq_length"] = self.max_seq_length
        if self.do_lower_case:
            found["do_lower_case"] = True
        if self.dense:
            found["dense_layers"] = [layer.model_dump() for layer in self.dense]
        return found


def read_sentence_modules(model: ModelConfig) -> SentenceModules:
    """What a model of embeddings, or a cross-encoder, says about itself; models for other tasks say nothing.

    Raises:
        UnsupportedModelError: it has a module, a pooling or a setting that cannot be reproduced.
        CorruptArtifactError: a file is damaged.
    """
    if not model.makes_embeddings and model.task != "reranking":
        return SentenceModules()
    files = SentenceFiles(resolve_model_path(model.path), model.revision)
    if model.task == "reranking":
        return _read_cross_encoder(files)
    if model.task == "image-feature-extraction":
        return _tower_modules(files, "image")
    modules = files.read(MODULES_FILE, must_know=True)
    if modules is not None:
        return _read_modules(files, modules)
    # sentence-transformers would not look at a pooling alone, but somebody has put it there.
    pooling = files.read(POOLING_FILE) if Path(files.path).is_dir() else None
    if pooling is not None:
        return _with_pooling(SentenceModules(files.path), POOLING_FILE, pooling)
    return _tower_modules(files, "text")


def _tower_modules(files: SentenceFiles, reads: Reads) -> SentenceModules:
    """What is known of towers of CLIP and SigLIP, whose files say nothing; nothing of other models."""
    fields = _config_fields(files)
    try:
        head = tower_head(fields, reads)
    except ValidationError as error:
        raise damaged(f"{files.path}/{CONFIG_FILE}", error) from error
    if head is None:
        return SentenceModules()
    return SentenceModules(files.path, pooling=head.pooling, dense=head.dense, is_tower=True)


def _config_fields(files: SentenceFiles) -> dict[str, Any]:
    """Configuration of a model; nothing where it is damaged, which is refused when the model is loaded."""
    try:
        return files.mapping(CONFIG_FILE)[1]
    except CorruptArtifactError:
        return {}


def with_own_settings(model: ModelConfig) -> ModelConfig:
    """The recipe's settings of a model, completed by what the model says itself, then by what is usual.

    Raises:
        RecipeError: the recipe asks for another pooling, normalization or similarity than the model was trained with.
        UnsupportedModelError, CorruptArtifactError: see :func:`read_sentence_modules`.
    """
    return completed(model, read_sentence_modules(model))


def completed(model: ModelConfig, own: SentenceModules) -> ModelConfig:
    """Settings of :func:`with_own_settings`, for a model that was read before."""
    found: dict[str, Any] = {}
    for name in ("pooling", "normalize", "similarity"):
        asked, says = getattr(model, name), getattr(own, name)
        if None not in (asked, says) and asked != says:
            raise RecipeError(
                f"expected model.{name}: {json.dumps(says)}, as the files of {own.source} say, "
                f"found {json.dumps(asked)}; change the recipe or leave the field out"
            )
        found[name] = asked if says is None else says
    if found["pooling"] is None and model.task == "sentence-similarity" and _is_causal(model):
        raise RecipeError(
            f"expected model.pooling for the causal model {model.path}, whose files name none, found none; give the "
            "one that it was trained with: mostly lasttoken"
        )
    if found["pooling"] == "pooler" and not own.is_tower:
        raise RecipeError(
            f"expected a pooling of token vectors for {model.path}, found model.pooling: pooler, the head that towers "
            "of CLIP and SigLIP have; leave the field out"
        )
    found["prompt"] = own.prompt if model.prompt is None else model.prompt
    for name in ("query_prompt", "passage_prompt", "dimensions"):
        found[name] = getattr(own, name) if getattr(model, name) is None else getattr(model, name)
    if found["prompt"] and not own.include_prompt:
        raise UnsupportedModelError(
            f"expected a pooling of all tokens, found one in {own.source} that leaves out those of the prompt "
            f"{found['prompt']!r} (include_prompt: false); set model.prompt: '' or choose another model"
        )
    return model.model_copy(update=found).with_defaults()


def _is_causal(model: ModelConfig) -> bool:
    """Whether a model reads from left to right, so that its last token alone has read all others."""
    fields = _config_fields(SentenceFiles(resolve_model_path(model.path), model.revision))
    entry = ARCHITECTURES.get(str(fields.get("model_type")))
    return entry is not None and entry.causal is not None


def length_files(transformer: str) -> list[str]:
    """Files with the settings of texts, beside a transformers model in this sub-folder."""
    return [f"{transformer}/{name}" if transformer else name for name in LENGTH_FILES]


def _read_modules(files: SentenceFiles, raw: Any) -> SentenceModules:
    where = f"{files.path}/{MODULES_FILE}"
    modules = _modules(raw, where)
    kinds = [kind for _, kind in modules]
    usual = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense")]
    if kinds not in (usual, [*usual, "Normalize"]):
        raise UnsupportedModelError(
            f"expected Transformer, Pooling, then any Dense layers and at most one Normalize in {where}, found "
            f"{shortened(', '.join(kinds)) or 'no modules'}; choose another model"
        )
    found = SentenceModules(files.path, normalize="Normalize" in kinds, transformer=modules[0][0].path)
    found = _with_prompt(_with_texts(found, files, _NEUTRAL), files)
    for module, kind in modules[1:]:
        name, fields = files.mapping(f"{module.path}/config.json")
        if kind == "Pooling":
            if not fields:
                raise damaged(f"{files.path}/{name}", "no pooling")
            found = _with_pooling(found, name, fields)
            continue
        check_neutral(fields, _ON_EMBEDDINGS, f"{files.path}/{name}")
        if kind == "Dense":
            layer = _dense_layer(fields, f"{files.path}/{name}")
            found = replace(found, dense=(*found.dense, layer), dense_folders=(*found.dense_folders, module.path))
    return replace(found, dimensions=_dimensions(found, files))


def _dimensions(found: SentenceModules, files: SentenceFiles) -> tuple[int, ...] | None:
    """Sizes that a model was trained to be cut to, from the first file that lists them: settings, or its model card.

    No release of sentence-transformers has a field for them; its cards show the settings of the loss.
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
    name, fields = files.mapping(SETTINGS_FILE)
    cut = checked(_Settings, fields, f"{files.path}/{name}").truncate_dim
    return None if cut is None else (cut,)


def _read_cross_encoder(files: SentenceFiles) -> SentenceModules:
    """What a folder of CrossEncoder says; before release 5.4 that was the activation alone."""
    name, settings = files.mapping(SETTINGS_FILE)
    found = SentenceModules(activation=read_score_activation(files.mapping("config.json")[1], settings, files.path))
    raw = files.read(MODULES_FILE, must_know=True)
    if raw is None:
        return found
    modules = _modules(raw, f"{files.path}/{MODULES_FILE}")
    if [kind for _, kind in modules] != ["Transformer"]:
        raise UnsupportedModelError(
            f"expected a Transformer alone for reranking in {files.path}/{MODULES_FILE}, found "
            f"{shortened(', '.join(kind for _, kind in modules)) or 'no modules'}; choose another model, or the task "
            "sentence-similarity for one of embeddings"
        )
    found = replace(found, source=files.path, transformer=modules[0][0].path)
    found = _with_prompt(_with_texts(found, files, _OF_PAIRS), files)
    if found.prompt:
        raise UnsupportedModelError(
            f"expected a cross-encoder without a default prompt in {files.path}/{name}, found {shown(found.prompt)}; "
            "set its default_prompt_name to null and put the prompt into the data"
        )
    return found


def _modules(raw: Any, where: str) -> list[tuple[_Module, str]]:
    """Modules with the names of their classes, from the content of ``modules.json``."""
    if not isinstance(raw, list):
        raise damaged(where, f"a {type(raw).__name__} where a list of modules should be")
    modules = [checked(_Module, each, where) for each in raw]
    return [(module, _kind(module, where)) for module in modules]


def _kind(module: _Module, where: str) -> str:
    """Name of a module's class; raises :class:`UnsupportedModelError` for one that is not known."""
    kind = module.type.rpartition(".")[2]
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    if not module.type.startswith("sentence_transformers.") or kind not in known:
        raise UnsupportedModelError(
            f"expected modules of sentence-transformers among {', '.join(known)} in {where}, found "
            f"{shown(module.type)}; choose a model without it"
        )
    return kind


def _with_texts(found: SentenceModules, files: SentenceFiles, neutral: dict[str, tuple[Any, ...]]) -> SentenceModules:
    """Add what is said about lengths and lower case."""
    name, fields = files.mapping(*length_files(found.transformer))
    check_neutral(fields, neutral, f"{files.path}/{name}")
    lengths = checked(_Lengths, fields, f"{files.path}/{name}")
    return replace(found, max_seq_length=lengths.max_seq_length, do_lower_case=lengths.do_lower_case)


def _with_prompt(found: SentenceModules, files: SentenceFiles) -> SentenceModules:
    """Add what is said about the default prompt and the similarity."""
    name, fields = files.mapping(SETTINGS_FILE)
    where = f"{files.path}/{name}"
    settings = checked(_Settings, fields, where)
    prompts, default, similarity = settings.prompts or {}, settings.default_prompt_name, settings.similarity_fn_name
    if default is not None and default not in prompts:
        raise damaged(where, f"default_prompt_name {default!r} and only prompts {list(prompts)}")
    if similarity is not None and similarity not in _SIMILARITIES:
        raise UnsupportedModelError(
            f"expected similarity_fn_name {', '.join(_SIMILARITIES)} in {where}, found {similarity!r}; choose another "
            "model"
        )
    of_passages = next((prompts[name] for name in _PASSAGE_PROMPTS if name in prompts), None)
    return replace(
        found,
        prompt=None if default is None else prompts[default],
        query_prompt=prompts.get("query"),
        passage_prompt=of_passages,
        similarity=None if similarity is None else _SIMILARITIES[similarity],
    )


def _with_pooling(found: SentenceModules, name: str, fields: Any) -> SentenceModules:
    where = f"{found.source}/{name}"
    settings = checked(_Pooling, fields, where)
    flags = {mode: fields[flag] for flag, mode in POOLING_FLAGS.items() if flag in fields}
    modes = settings.pooling_mode
    if modes is None:
        modes = [mode for mode, used in flags.items() if used] if flags else "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UnsupportedModelError(
            f"expected exactly one pooling of {', '.join(_POOLINGS)} in {where}, found "
            f"{shortened(' + '.join(modes)) or 'none'}; "
            "choose another model"
        )
    return replace(
        found,
        pooling=cast("Pooling", modes[0]),
        include_prompt=settings.include_prompt,
        width=settings.embedding_dimension or settings.word_embedding_dimension,
    )


def _dense_layer(fields: dict[str, Any], where: str) -> DenseLayer:
    settings = checked(_Dense, fields, where)
    module, _, activation = settings.activation_function.rpartition(".")
    if not module.startswith("torch.nn") or activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"expected an activation_function of torch.nn among {', '.join(ACTIVATIONS)} in {where}, found "
            f"{shown(settings.activation_function)}; choose another model"
        )
    sizes = settings.model_dump(include={"in_features", "out_features", "bias"})
    try:
        return DenseLayer.model_validate({**sizes, "activation": activation})
    except ValidationError as error:
        raise damaged(where, error) from error
