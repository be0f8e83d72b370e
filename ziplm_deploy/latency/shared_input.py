"""What a model computes once for all of its layers, such as MPNet's position bias: the base of a table holds it.

So it is with masks of local and global attention, and with sines and cosines of rotary positions.
DeBERTa's is its mask of token pairs; what its attention reads of distances depends on no input, and costs nothing.

A graph leaves out what nobody reads: a model without layers would be timed without it, and a stack of four layers with
it. Cells would then hold a quarter of it each, and twelve layers would count it three times. So every model of a table
but the whole ones reads it, by one more layer that does nothing else: the base holds it once, and in the difference of
two stacks it cancels out. A plan without any attention is predicted with it all the same. Where layers of two kinds
get inputs of their own, as ModernBERT's with local and with global attention do, there is a reader for each kind.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import attention_kind, layers_of

_Model = TypeVar("_Model", bound=nn.Module)


class _Reader(nn.Module):
    """A layer that adds one number of each shared input to its own."""

    def __init__(self, names: tuple[str, ...], layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self._names, self._returns_tuple = names, returns_tuple
        self._signature = inspect.signature(layer.forward)
        self.attention_type = attention_kind(layer)  # by which a model with several chooses the inputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        given = self._signature.bind(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        hidden: Tensor = given["hidden_states"]  # [batch, length, hidden]
        for name in self._names:
            shared = given[name]
            for tensor in (shared,) if isinstance(shared, Tensor) else shared:
                hidden = hidden + torch.flatten(tensor)[:1]  # [1]
        return (hidden, None) if self._returns_tuple else hidden


def with_shared_inputs(model: _Model, layers_before: nn.ModuleList) -> _Model:
    """``model``, changed in place so that it computes what its kind shares between layers; most kinds share nothing.

    Args:
        model: with any number of layers, also none.
        layers_before: layers of such a model, which say where in a call the shared inputs stand, and how many kinds of
            layers there are.
    """
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    if architecture.shared_inputs:
        layers = layers_of(model)
        for layer in {attention_kind(layer): layer for layer in layers_before}.values():
            layers.append(_Reader(architecture.shared_inputs, layer, architecture.layer_returns_tuple))
        # transformers 4 makes a list of so many head masks, one for each layer.
        setattr(model.base_model.config, architecture.config_layers, len(layers))  # type: ignore[union-attr]
    return model
