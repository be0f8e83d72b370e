"""What a folder of CrossEncoder says: activation over the score, lengths, and how a language model answers.

Before release 5.4 of sentence-transformers that was the activation alone. Since then it may be a causal language model:
``LogitScore`` names the tokens whose logits are its score, and the default prompt is the instruction in the chat
template that puts query and document together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from ziplm_deploy.documents import shortened, shown
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.causal import is_causal
from ziplm_deploy.models.location import CONFIG_FILE
from ziplm_deploy.models.score_activation import read_score_activation
from ziplm_deploy.models.sentence_fields import module_list, with_prompts, with_texts
from ziplm_deploy.models.sentence_files import (
    MODULES_FILE,
    SETTINGS_FILE,
    Fields,
    SentenceFiles,
    check_neutral,
    checked,
)
from ziplm_deploy.models.sentence_record import SentenceModules

# Fields that change what a cross-encoder answers, and the values with which they do not.
_LOGITS = {"method": "forward", "method_output_name": "logits"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("sequence-classification",),
    "module_output_name": ("scores",),
    "modality_config": ({"text": _LOGITS},),
    **dict.fromkeys(("processing_kwargs", "processor_kwargs", "tokenizer_args", "config_kwargs", "config_args"), ({},)),
    **dict.fromkeys(("query_expansion", "query_length", "document_length"), ()),
}
_AS_MESSAGES = tuple({"text": _LOGITS, "message": {**_LOGITS, "format": kind}} for kind in ("flat", "structured"))
# Of a causal one: a chat template stands for the prompt that the recipe names.
_CAUSAL: dict[str, tuple[Any, ...]] = _NEUTRAL | {
    "modality_config": ({"text": _LOGITS}, *_AS_MESSAGES),
    "processing_kwargs": ({}, {"chat_template": {"add_generation_prompt": True}}),
}
_LANGUAGE_MODEL: dict[str, tuple[Any, ...]] = _CAUSAL | {
    "transformer_task": ("text-generation",),
    "module_output_name": ("causal_logits",),
}


class _LogitScore(Fields):
    true_token_id: int = Field(ge=0)
    false_token_id: int | None = Field(None, ge=0)


def read_activation(files: SentenceFiles) -> SentenceModules:
    """What a regression model says about the activation over its score, as folders of CrossEncoder do.

    Raises:
        UnsupportedModelError: an activation that changes the order of scores.  CorruptArtifactError: a damaged file.
    """
    settings, config = files.mapping(SETTINGS_FILE)[1], files.config()
    return SentenceModules(activation=read_score_activation(config, settings, files.path))


def read_cross_encoder(files: SentenceFiles) -> SentenceModules:
    """What a cross-encoder says about itself.

    Raises:
        UnsupportedModelError: it has a module or a setting that cannot be reproduced.
        CorruptArtifactError: a file is damaged.
    """
    name, settings = files.mapping(SETTINGS_FILE)
    config = files.mapping(CONFIG_FILE)[1]
    found = SentenceModules(activation=read_score_activation(config, settings, files.path))
    raw = files.read(MODULES_FILE, must_know=True)
    if raw is None:
        return found
    modules = module_list(raw, f"{files.path}/{MODULES_FILE}")
    kinds = [kind for _, kind in modules]
    causal = is_causal(config)
    if kinds != ["Transformer"] and (kinds != ["Transformer", "LogitScore"] or not causal):
        raise UnsupportedModelError(
            f"expected a Transformer alone for reranking in {files.path}/{MODULES_FILE}, or a causal language model "
            f"and a LogitScore, found {shortened(', '.join(kinds)) or 'no modules'}; choose another model, or the "
            "task sentence-similarity for one of embeddings"
        )
    found = replace(found, source=files.path, transformer=modules[0][0].path)
    neutral = _CAUSAL if causal else _NEUTRAL
    if len(modules) == 2:
        found = replace(found, answer_ids=_answer_ids(files, modules[1][0].path))
        neutral = _LANGUAGE_MODEL
    found = with_prompts(with_texts(found, files, neutral), files)
    if found.prompt and causal:
        return replace(found, prompt=None, instruction=found.prompt)
    if found.prompt:
        raise UnsupportedModelError(
            f"expected a cross-encoder without a default prompt in {files.path}/{name}, found {shown(found.prompt)}; "
            "set its default_prompt_name to null and put the prompt into the data"
        )
    return found


def _answer_ids(files: SentenceFiles, folder: str) -> tuple[int, ...]:
    """Tokens whose logits make the score: of yes, and of no if it is taken off."""
    name, fields = files.mapping(f"{folder}/config.json")
    where = f"{files.path}/{name}"
    check_neutral(fields, {"module_input_name": ("causal_logits",)}, where)
    tokens = checked(_LogitScore, fields, where)
    return tuple(each for each in (tokens.true_token_id, tokens.false_token_id) if each is not None)
