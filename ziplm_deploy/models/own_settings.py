"""Settings of a recipe's model, completed by what the model says about itself, then by what is usual."""

from __future__ import annotations

import json
from typing import Any

from ziplm_deploy.errors import RecipeError, UnsupportedModelError
from ziplm_deploy.models.causal import has_language_head, is_causal
from ziplm_deploy.models.location import resolve_model_path
from ziplm_deploy.models.sentence_files import SentenceFiles
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.models.sentence_record import SentenceModules
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.recipe.model import OF_CAUSAL_RERANKERS
from ziplm_deploy.recipe.pair_prompt import INSTRUCTION, QWEN3_RERANKER, takes_instruction


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
    if found["pooling"] is None and model.task == "sentence-similarity" and is_causal(_config_fields(model)):
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
    size = own.dense[-1].out_features if own.dense else own.width
    if own.truncated is not None and (size is None or own.truncated < size):
        # What sentence-transformers serves, whatever else is asked for.
        found["dimensions"] = tuple(sorted({*(found["dimensions"] or ()), own.truncated}))
    if own.prompt and model.prompt is None:
        # encode() has a default prompt of the model's files, encode_query() and encode_document() have not.
        found |= {name: "" for name in ("query_prompt", "passage_prompt") if found[name] is None}
    if found["prompt"] and not own.include_prompt:
        raise UnsupportedModelError(
            f"expected a pooling of all tokens, found one in {own.source} that leaves out those of the prompt "
            f"{found['prompt']!r} (include_prompt: false); set model.prompt: '' or choose another model"
        )
    activation = "Identity" if own.activation is None else own.activation.rpartition(".")[2]
    if model.task == "text-regression" and model.score_activation is None and activation != "Identity":
        found["score_activation"] = activation
    if model.task == "reranking":
        found |= _of_reranker(model, own)
    return model.model_copy(update=found).with_defaults()


def _of_reranker(model: ModelConfig, own: SentenceModules) -> dict[str, Any]:
    """How a causal reranker reads a pair; nothing for encoders, whose tokenizers put pairs together."""
    fields = _config_fields(model)
    if not is_causal(fields):
        asked = [name for name in OF_CAUSAL_RERANKERS if getattr(model, name) is not None]
        if asked:
            raise RecipeError(
                f"expected no model.{asked[0]} for the encoder {model.path}, whose tokenizer puts pairs together and "
                "whose head scores them, found one; leave it out"
            )
        return {}
    if model.answer_tokens is not None and not has_language_head(fields):
        raise RecipeError(
            f"expected no model.answer_tokens for {model.path}, which has a head of its own for scores, found "
            f"{json.dumps(model.answer_tokens)}; leave it out"
        )
    prompt = model.pair_prompt
    if prompt is None and fields.get("model_type") == "qwen3" and has_language_head(fields):
        prompt = QWEN3_RERANKER
    if prompt is None:
        raise RecipeError(
            f"expected model.pair_prompt for the causal reranker {model.path}, which does not say how it reads a pair, "
            f"found none; give the one that it was trained with: {QWEN3_RERANKER} for a converted Qwen3-Reranker, a "
            "text with {query} and {document}, or '' for pairs as its tokenizer puts them together"
        )
    if not takes_instruction(prompt):
        return {"pair_prompt": prompt}
    return {"pair_prompt": prompt, "instruction": model.instruction or own.instruction or INSTRUCTION}


def _config_fields(model: ModelConfig) -> dict[str, Any]:
    return SentenceFiles(resolve_model_path(model.path), model.revision).config()
