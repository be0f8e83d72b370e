"""Layer normalizations in the form that ONNX Runtime recognizes below opset 17, where torch spells them out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def norms_with_biases(model: nn.Module) -> Iterator[None]:
    """Give LayerNorms without a bias, as ModernBERT's, one of zeros for the block."""
    every: list[nn.LayerNorm] = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    norms = [norm for norm in every if norm.elementwise_affine and norm.bias is None]
    for norm in norms:
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight))
    try:
        yield
    finally:
        for norm in norms:
            norm.register_parameter("bias", None)
