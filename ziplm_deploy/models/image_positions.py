"""Position embeddings of an image model, settled at the size of the images that it gets."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ziplm_deploy.models.architectures import architecture_of

_Module = TypeVar("_Module", bound=nn.Module)


def fix_positions(model: _Module) -> _Module:
    """Have a model that interpolates its positions for every image take images of ``image_size`` only.

    Other models stay as they are.
    """
    sized = architecture_of(model.config).sized_embeddings  # type: ignore[arg-type]
    if sized is not None:
        model.base_model.embeddings.__class__ = sized  # type: ignore[union-attr]
    return model


def settle_positions(model: nn.Module, size: tuple[int, int]) -> bool:
    """Interpolate the positions of such a model in place for images ``(height, width)``; False if they stay.

    DINOv2 was trained on images of 518 pixels and is served with 224: its own code interpolates them, once, and
    ``image_size`` says what they are for. They are those of squares, and images of another form stay refused.
    """
    config: Any = model.config
    height, width = size
    sized = architecture_of(config).sized_embeddings
    if sized is None or height != width or config.image_size in (height, [height, width]):
        return False
    embeddings: Any = model.base_model.embeddings  # type: ignore[union-attr]
    rows, columns = embeddings.patch_embeddings.patch_size
    patches = (height // rows) * (width // columns)
    tokens = torch.zeros(1, patches + 1, config.hidden_size)  # of the class, then of the patches
    with torch.no_grad():
        positions = super(sized, embeddings).interpolate_pos_encoding(tokens, height, width)
    embeddings.position_embeddings = nn.Parameter(positions.detach().clone())
    embeddings.patch_embeddings.num_patches = patches
    config.image_size = height
    return True
