"""Causal language models of transformers as all that prunes, trains and compresses expects models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ziplm_deploy.models.architectures import ARCHITECTURES, architecture_of

_Module = TypeVar("_Module", bound=nn.Module)


def as_linears(model: _Module) -> _Module:
    """Replace every ``Conv1D`` ``[in, out]`` of a model in place by the linear ``[out, in]`` that computes the same.

    State dicts of the result are not those of transformers: square weights would be taken as they are, transposed.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, _as_linear(module))
    return model


def stock_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a model as its class in transformers has it: what :func:`as_linears` turned, turned back."""
    with torch.device("meta"):
        stock = type(model)(model.config)
    turned = {f"{name}.weight" for name, module in stock.named_modules() if isinstance(module, Conv1D)}
    return {name: value.T.contiguous() if name in turned else value for name, value in model.state_dict().items()}


def is_language_model(model: nn.Module) -> bool:
    """Whether a model writes text: a causal one with its head over the vocabulary. Without, it is an encoder."""
    causal = architecture_of(model.config).causal is not None  # type: ignore[arg-type]
    return causal and model.get_output_embeddings() is not None  # type: ignore[operator]


def is_causal(fields: Mapping[str, Any]) -> bool:
    """Whether a model reads from left to right, so that its last token alone has read all others.

    Args:
        fields: of its ``config.json``.
    """
    entry = ARCHITECTURES.get(str(fields.get("model_type")))
    return entry is not None and entry.causal is not None


def has_language_head(fields: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a causal model with its head over the vocabulary, by its ``config.json``."""
    classes = fields.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else ""
    return is_causal(fields) and isinstance(named, str) and named.endswith(("ForCausalLM", "LMHeadModel"))


def end_tokens(model: nn.Module, processor: Any) -> list[int]:
    """Ids of all tokens that end a text, by configuration and generation settings of the model and by the tokenizer."""
    settings = (model.config, getattr(model, "generation_config", None), processor)
    named = [getattr(each, "eos_token_id", None) for each in settings]
    listed = [token for each in named for token in (each if isinstance(each, list) else [each])]
    return list(dict.fromkeys(int(token) for token in listed if token is not None))


def keep_end_tokens(model: nn.Module, processor: Any) -> None:
    """Name every token that ends a text in the configuration, the only settings that members and all loaders share.

    Chat models name some in ``generation_config.json``, or by their tokenizer, alone.
    """
    config: Any = model.config
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    found = end_tokens(model, processor)
    if set(found) - set(named):
        config.eos_token_id = found if len(found) > 1 else found[0]


def without_cache(model: _Module) -> _Module:
    """Have a causal language model keep no keys and values, but where text is generated: ``model.generate`` still does.

    A layer that is run again, as in reconstruction, would otherwise read what it wrote before.
    """
    config: Any = model.config
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return model


def _as_linear(module: Conv1D) -> nn.Linear:
    n_in, n_out = module.weight.shape
    linear = nn.Linear(n_in, n_out, device="meta")  # skips the random initialization
    with torch.no_grad():
        linear.weight = nn.Parameter(module.weight.T.contiguous())
        linear.bias = nn.Parameter(module.bias.detach().clone())
    return linear.train(module.training)
