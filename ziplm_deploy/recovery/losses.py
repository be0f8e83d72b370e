"""The distillation loss ``λ1·task + λ2·logits + λ3·token`` (ZipLM, section 3.3), and where its parts come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ziplm_deploy.models.modules import layers_of, prunable_modules

EPSILON = 1e-6


class LayerOutputs:
    """Recorder of the output ``[batch, length, hidden]`` of the given layers at every forward pass, while entered."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self._model, self._layers = model, list(layers)
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LayerOutputs:
        layers = layers_of(self._model)
        for index in self._layers:
            self._handles.append(layers[index].register_forward_hook(self._recorder(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _recorder(self, index: int) -> Any:
        def record(_: nn.Module, _args: Any, output: Any) -> None:
            self._found[index] = output[0] if isinstance(output, tuple) else output

        return record

    def packed(self, mask: Tensor | None) -> list[Tensor]:
        """Outputs of the last forward pass, ``[tokens, hidden]`` a layer, without the tokens whose ``mask`` is 0."""
        found = [self._found[index] for index in self._layers]
        self._found.clear()
        return [h.flatten(0, 1) if mask is None else h[mask.bool()] for h in found]  # [N, hidden]


def remaining_layers(model: nn.Module) -> list[int]:
    """Layers of which at least one module is left: only these are compared with the teacher's."""
    return sorted({module.layer for module in prunable_modules(model) if module.structures > 0})


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ``MSE(h_S, h_T) / (MSE(h_T, 0) + ε)``: free of scale, comparable between models.

    Args:
        student, teacher: hidden states ``[tokens, hidden]`` of the same layers and tokens, in the same order.
    """
    terms = []
    for h_S, h_T in zip(student, teacher, strict=True):
        h_S, h_T = h_S.float(), h_T.float()
        terms.append((h_S - h_T).square().mean() / (h_T.square().mean() + EPSILON))
    return torch.stack(terms).mean()
