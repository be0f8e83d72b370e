"""A model as transformers builds or loads it, turned into what all that prunes, trains and exports expects."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.models.image_positions import fix_positions
from ziplm_deploy.models.layer_scale import fold_layer_scales

_Module = TypeVar("_Module", bound=nn.Module)


def prepared(model: _Module) -> _Module:
    """Change a model in place, and give it back; its answers stay, but for rounding.

    Every linear is a :class:`torch.nn.Linear`, no layer scale is left, and positions are those of one image size.
    """
    return fix_positions(fold_layer_scales(as_linears(model)))
