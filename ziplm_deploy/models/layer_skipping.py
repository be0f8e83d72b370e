"""Layers that need not run again, since the hidden states that they make are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


class SkippedLayer(nn.Module):
    """Stands in for a layer whose output is already known; returns it in the layer's own format.

    Attributes:
        output: hidden states to return; None: those that it is called with.
    """

    def __init__(self, output: Any, layer: nn.Module) -> None:
        """``output``: any that ``layer`` has made, for its format."""
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # transformers 4 asks Qwen's layers for their mask
        self.output: Tensor | None = None
        self._more = (None,) * (len(output) - 1) if isinstance(output, tuple) else None  # values after the first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.output if self.output is not None else layer_input(args, kwargs)
        return hidden if self._more is None else (hidden, *self._more)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer was called with, whatever its signature calls them."""
    hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    if not isinstance(hidden, Tensor):
        raise TypeError("the layer was called without hidden states")
    return hidden


@contextlib.contextmanager
def layers_skipped(layers: nn.ModuleList, stand_ins: Sequence[SkippedLayer], hidden: Tensor | None) -> Iterator[None]:
    """Put stand-ins in the place of the first layers, the last of them with the output ``hidden``, for a while."""
    own = list(layers)[: len(stand_ins)]
    try:
        for index, stand_in in enumerate(stand_ins):
            stand_in.output = hidden if index == len(stand_ins) - 1 else None
            layers[index] = stand_in
        yield
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer
