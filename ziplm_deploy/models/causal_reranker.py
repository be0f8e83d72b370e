"""A language model that ranks pairs by what it would answer, as a classifier with one output.

Qwen3-Reranker reads a query and a document in a prompt and is asked for yes or no. The softmax over the logits of the
two is the sigmoid of their difference, for which two rows of the head over the vocabulary are enough::

    logit_yes - logit_no = (w_yes - w_no) · h        h: last hidden state of the last token

So a model with that one row as its head ranks alike, and its file holds no vocabulary twice (Qwen3 Embedding, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.adapted import model_class
from ziplm_deploy.recipe import ModelConfig
from ziplm_deploy.tasks.pairs import pair_prompt_of, tokenize_pairs

ANSWERS = ("yes", "no")
_ANY_LENGTH = 1 << 20  # tokens


def answer_ids(processor: Any, settings: ModelConfig, own: Sequence[int]) -> tuple[int, ...]:
    """Tokens whose logits rank: of the recipe's answers, else those that the model's files say, else of yes and no.

    Raises:
        UnsupportedModelError: the vocabulary has no such token.  CorruptArtifactError: nor one of that number.
    """
    vocabulary: dict[str, int] = processor.get_vocab()
    if settings.answer_tokens is None and own:
        beyond = [number for number in own if number not in set(vocabulary.values())]
        if beyond:
            raise CorruptArtifactError(
                f"expected tokens of the vocabulary in the LogitScore of {settings.path}, found {beyond[0]}; get the "
                "model anew"
            )
        return tuple(own)
    tokens = settings.answer_tokens or ANSWERS
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise UnsupportedModelError(
            f"expected the answers {' and '.join(map(repr, tokens))} as one token each in the vocabulary of "
            f"{settings.path}, found no {missing[0]!r}; name those that it was trained with in model.answer_tokens, as "
            "its vocabulary spells them"
        )
    return tuple(vocabulary[token] for token in tokens)


def as_classifier(language_model: nn.Module, answers: Sequence[int]) -> nn.Module:
    """A classifier of transformers with one output over the last token; takes the layers of the language model over.

    Args:
        answers: tokens of yes and, if its logit is taken off, of no.
    """
    config: Any = language_model.config
    head: Any = language_model.get_output_embeddings()  # type: ignore[operator]
    rows = head.weight.detach()[list(answers)]  # [1 or 2, hidden]
    config.num_labels = 1
    built = model_class(config, "AutoModelForSequenceClassification")
    with torch.device("meta"):  # layers and embeddings are those of the language model
        classifier: nn.Module = built(config)
        score = nn.Linear(rows.shape[1], 1, bias=False)
    score.weight = nn.Parameter(rows[:1] - rows[1:] if len(rows) > 1 else rows.clone())  # [1, hidden]
    setattr(classifier, classifier.base_model_prefix, language_model.base_model)  # type: ignore[arg-type]
    classifier.score = score
    return classifier.eval()


def prepare_reranker(model: nn.Module, processor: Any, settings: ModelConfig) -> None:
    """Have a causal classifier find the last token of a padded row, and its tokenizer put pairs together.

    transformers takes the last token that is no padding by its number; files take it by the attention mask.

    Raises:
        UnsupportedModelError: no token for padding, or pairs that end in it.
    """
    if processor.pad_token_id is None:
        raise UnsupportedModelError(
            f"expected a tokenizer with a token for padding for the causal reranker {settings.path}, found none; set "
            "pad_token in its tokenizer_config.json"
        )
    prompt = pair_prompt_of(settings)
    processor.chat_template = None if prompt is None else prompt.chat_template()
    pair = [{"text": "a", "text_pair": "b"}]
    if tokenize_pairs(processor, prompt, pair, _ANY_LENGTH)[0]["input_ids"][-1] == processor.pad_token_id:
        raise UnsupportedModelError(
            f"expected pairs that end in another token than the one for padding, {processor.pad_token!r}, which a "
            f"causal reranker looks for the last token by, found such pairs for {settings.path}; set another pad_token "
            "in its tokenizer_config.json"
        )
    config: Any = model.config
    config.pad_token_id = processor.pad_token_id
