"""Fields of a sentence-transformers model's files, a function for each kind: modules, texts, prompts, pooling, Dense.

Releases of every age are read; what cannot be reproduced is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, cast

from pydantic import Field, ValidationError

from ziplm_deploy.documents import shortened, shown
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.sentence_dense import ACTIVATIONS, DenseLayer
from ziplm_deploy.models.sentence_files import (
    SETTINGS_FILE,
    Fields,
    SentenceFiles,
    check_neutral,
    checked,
    damaged,
    length_files,
)
from ziplm_deploy.models.sentence_record import SentenceModules
from ziplm_deploy.recipe import Pooling, Similarity

# Before release 5.4 each pooling had a flag, since then there is one name.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize", "LogitScore")
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the first that there is; members name it document
_POOLINGS = ("mean", "cls", "max", "lasttoken")
_SIMILARITIES: dict[str, Similarity] = {
    **{"cosine": "cosine", "cos_sim": "cosine", "dot": "dot", "dot_score": "dot", "dot_product": "dot"},
    **{"euclidean": "euclidean", "manhattan": "manhattan"},
}


class Module(Fields):
    """An entry of ``modules.json``."""

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


def module_list(raw: Any, where: str) -> list[tuple[Module, str]]:
    """Modules with the names of their classes, from the content of ``modules.json``.

    Raises:
        CorruptArtifactError: the content is no list of modules.  UnsupportedModelError: a class that is not known.
    """
    if not isinstance(raw, list):
        raise damaged(where, f"a {type(raw).__name__} where a list of modules should be")
    modules = [checked(Module, each, where) for each in raw]
    return [(module, _kind(module, where)) for module in modules]


def _kind(module: Module, where: str) -> str:
    """Name of a module's class; raises :class:`UnsupportedModelError` for one that is not known."""
    kind = module.type.rpartition(".")[2]
    if not module.type.startswith("sentence_transformers.") or kind not in _KINDS:
        raise UnsupportedModelError(
            f"expected modules of sentence-transformers among {', '.join(_KINDS)} in {where}, found "
            f"{shown(module.type)}; choose a model without it"
        )
    return kind


def with_texts(found: SentenceModules, files: SentenceFiles, neutral: dict[str, tuple[Any, ...]]) -> SentenceModules:
    """Add what is said about lengths and lower case; ``neutral``: values of other settings that change nothing."""
    name, fields = files.mapping(*length_files(found.transformer))
    check_neutral(fields, neutral, f"{files.path}/{name}")
    lengths = checked(_Lengths, fields, f"{files.path}/{name}")
    return replace(found, max_seq_length=lengths.max_seq_length, do_lower_case=lengths.do_lower_case)


def with_prompts(found: SentenceModules, files: SentenceFiles) -> SentenceModules:
    """Add what is said about prompts, the similarity and the size of embeddings."""
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
        truncated=settings.truncate_dim,
    )


def with_pooling(found: SentenceModules, name: str, fields: Any) -> SentenceModules:
    """Add the pooling that the fields of its file ``name`` say."""
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


def dense_layer(fields: dict[str, Any], where: str) -> DenseLayer:
    """A Dense layer by the fields of its file; raises :class:`UnsupportedModelError` for other activations."""
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
