"""Whether a tokenizer or image processor gives what the model takes, found out when both are loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.adapted import model_class
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.deployed import longest_text
from ziplm_deploy.models.image_positions import settle_positions

_NO_LIMIT = 1 << 30  # tokens; tokenizers without a limit have a larger number


def check_processor(model: nn.Module, processor: Any, input_kind: str, path: str) -> None:
    """Refuse a tokenizer of more tokens than the model has, or that pads an encoder on the left; or images that differ.

    A model that interpolates its positions takes the size of the images that its processor gives: see
    :func:`settle_positions`.

    Raises:
        UnsupportedModelError: they do not fit; says how.
    """
    if input_kind == "image":
        _check_images(model, processor, path)
    else:
        _check_tokens(model, processor, path)


def positions_of(config: Any, auto_class: str) -> int:
    """Tokens that a model takes, by its configuration alone: one of ``meta`` tensors is built.

    Raises:
        UnsupportedModelError: no model that can be pruned.
    """
    architecture_of(config)
    with torch.device("meta"):
        return longest_text(model_class(config, auto_class)(config))


def limit_length(processor: Any, model: nn.Module) -> None:
    """Have a tokenizer cut texts where those end that the model's file takes, in every loader.

    A tokenizer whose own limit is larger than an encoder's positions counts them in its own way, and is left alone.
    """
    length, longest = getattr(processor, "model_max_length", 0), longest_text(model)
    is_causal = architecture_of(model.config).causal is not None  # type: ignore[arg-type]
    if (length > _NO_LIMIT or is_causal) and longest < min(length, _NO_LIMIT):
        processor.model_max_length = longest


def _check_tokens(model: nn.Module, tokenizer: Any, path: str) -> None:
    embeddings: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= embeddings)
    if beyond:
        number, token = beyond[0]
        raise UnsupportedModelError(
            f"expected a tokenizer with tokens 0 to {embeddings - 1} in {path}, as many as the model has embeddings, "
            f"found {len(beyond)} more, the first {token!r} ({number}); take the tokenizer that the model was trained "
            "with, or call resize_token_embeddings and train them"
        )
    if architecture_of(model.config).causal is None and tokenizer.padding_side == "left":  # type: ignore[arg-type]
        raise UnsupportedModelError(
            "expected a tokenizer that pads on the right for an encoder, whose first token and positions would differ "
            f"with every batch, found one in {path} that pads on the left; set padding_side in its "
            "tokenizer_config.json"
        )


def _check_images(model: nn.Module, processor: Any, path: str) -> None:
    config: Any = model.config
    if config.num_channels != 3:
        raise UnsupportedModelError(
            f"expected a model of images with 3 channels (RGB), found num_channels {config.num_channels} in {path}; "
            "other images are not supported"
        )
    size = config.image_size
    wanted = (3, *((size, size) if isinstance(size, int) else size))
    image = np.zeros((wanted[1] + 7, wanted[2] + 13, 3), dtype=np.uint8)  # of no size that fits by chance
    try:
        found = tuple(processor(images=[image], return_tensors="np")["pixel_values"][0].shape)
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise UnsupportedModelError(
            f"expected an image processor that takes RGB images in {path}, found: {error}; correct "
            "preprocessor_config.json"
        ) from error
    if len(found) == 3 and settle_positions(model, (found[1], found[2])):
        return
    if found != wanted:
        raise UnsupportedModelError(
            f"expected an image processor that gives {_shape(wanted)} pixels, as image_size of the model in {path} "
            f"says, found {_shape(found)}; correct size in preprocessor_config.json"
        )


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
