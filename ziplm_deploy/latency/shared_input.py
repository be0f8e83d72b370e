"""What a model computes once for all of its layers, such as MPNet's position bias: the base of a table holds it.

DeBERTa's is its mask of token pairs; what its attention reads of distances depends on no input, and costs nothing.

A graph leaves out what nobody reads: a model without layers would be timed without it, and a stack of four layers with
it. Cells would then hold a quarter of it each, and twelve layers would count it three times. So every model of a table
but the whole ones reads it, by one more layer that does nothing else: the base holds it once, and in the difference of
two stacks it cancels out. A plan without any attention is predicted with it all the same.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import Tensor, nn

from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import layers_of

_Model = TypeVar("_Model", bound=nn.Module)


class _Reader(nn.Module):
    """A layer that adds one number of the shared input to its own."""

    def __init__(self, name: str, signature: inspect.Signature) -> None:
        super().__init__()
        self._name, self._signature = name, signature

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given = self._signature.bind(self, *args, **kwargs).arguments
        hidden: Tensor = given["hidden_states"]  # [batch, length, hidden]
        shared: Tensor = given[self._name]  # [1 or batch, heads or 1, length, length]
        return hidden + shared[:, 0, :1, :1], None


def with_shared_input(model: _Model, layer: type[nn.Module]) -> _Model:
    """``model``, changed in place so that it computes what its kind shares between layers; most kinds share nothing.

    Args:
        model: with any number of layers, also none.
        layer: class of a layer, which says where in a call the shared input stands.
    """
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    if architecture.shared_input is not None:
        layers = layers_of(model)
        layers.append(_Reader(architecture.shared_input, inspect.signature(layer.forward)))
        # transformers 4 makes a list of so many head masks, one for each layer.
        setattr(model.base_model.config, architecture.config_layers, len(layers))  # type: ignore[union-attr]
    return model
