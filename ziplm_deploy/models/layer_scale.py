"""Layer scales folded into the linears before them, so that pruning sees what a block really adds to the residual."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.models.shape import MODULE_KINDS

_Module = TypeVar("_Module", bound=nn.Module)


class FoldedScale(nn.Module):
    """A layer scale of ones, which does nothing; ``lambda1`` ``[hidden]`` keeps checkpoints those of transformers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("lambda1", torch.ones(size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def fold_layer_scales(model: _Module) -> _Module:
    """Multiply every layer scale of a model in place into weight and bias of the output linear that it follows.

    The answers stay, but for rounding; models without layer scales stay as they are.
    """
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    for kind in MODULE_KINDS:
        path = architecture.scale(kind)
        if path is None:
            continue
        for layer in layers_of(model):
            scale: Any = layer.get_submodule(path)
            if isinstance(scale, FoldedScale):
                continue
            values: torch.Tensor = scale.lambda1.detach()  # [hidden]
            linear = layer.get_submodule(architecture.output(kind))
            assert isinstance(linear, nn.Linear)
            with torch.no_grad():
                linear.weight.mul_(values[:, None])  # [hidden, columns]
                if linear.bias is not None:
                    linear.bias.mul_(values)
            owner, _, name = path.rpartition(".")
            layer.get_submodule(owner)._modules[name] = FoldedScale(len(values)).to(values)
    return model
