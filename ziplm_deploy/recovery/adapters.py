"""Low-rank adapters in place of full training (LoRA, Hu et al., 2021): ``y = W x + b + α/r · U (D x)``.

Only the factors ``D`` ``[r, in]`` and ``U`` ``[out, r]`` of every linear are trained. ``U`` begins at 0, so that an
adapted model begins with the answers of the model itself; merging makes ``W + α/r · U D`` the weight, and leaves
nothing of the adapters behind. The product ``U D`` is formed only then: in training, which keeps what it multiplies by,
it would take as much memory as the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ziplm_deploy.models.modules import layer_linears
from ziplm_deploy.recipe import LoraConfig


class Adapter(nn.Module):
    """The trained change of one linear, as its two factors.

    Args:
        rank: of the change; no more than the smaller side of the linear, of which every matrix has at most that rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * functional.linear(functional.linear(x, self.down), self.up)  # [..., in] -> [..., out]

    @property
    def change(self) -> Tensor:
        """What is added to the weight, ``[out, in]``."""
        return self.scale * (self.up @ self.down)


class AdaptedLinear(nn.Linear):
    """A linear with an adapter beside its weight and bias, which are the same parameters as before."""

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.adapter = adapter

    def forward(self, input: Tensor) -> Tensor:
        answer: Tensor = super().forward(input) + self.adapter(input)
        return answer


def insert_adapters(model: nn.Module, config: LoraConfig, seed: int) -> list[Adapter]:
    """Give every linear inside the layers an adapter, in place, and freeze all else; the adapters, in model order.

    A linear that pruning left narrower than ``config.rank`` gets one of its own smaller side. The same seed makes the
    same adapters.
    """
    model.requires_grad_(False)
    adapters = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, linear in layer_linears(model).items():
            adapter = Adapter(linear, min(config.rank, *linear.weight.shape), config.alpha / config.rank)
            model.set_submodule(name, AdaptedLinear(linear, adapter.to(linear.weight)))
            adapters.append(adapter)
    return adapters


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weight of its linear, in place, and put plain linears with the same parameters back."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, AdaptedLinear):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
            plain.weight, plain.bias, plain.training = linear.weight, linear.bias, linear.training
            plain.weight.add_(linear.adapter.change)
            model.set_submodule(name, plain)


def adapters_of(model: nn.Module) -> nn.ModuleList:
    """The adapters that a model has, in its order; empty for most models."""
    return nn.ModuleList(module.adapter for module in model.modules() if isinstance(module, AdaptedLinear))
