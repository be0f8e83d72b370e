"""How far a changed model's answers are from those that it gave before."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ziplm_deploy.models.layer_skipping import SkippedLayer, layer_input, layers_skipped
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch

STATES_BYTES = 2**30  # of hidden states that are kept, of all batches together


class Divergence:
    """Mean divergence over batches from what a model answers now, in eval mode; called once the model is changed.

    Hidden states between the layers are kept: a call that is told what was changed runs from its first layer on.
    """

    def __init__(self, task: Task, model: nn.Module, batches: Sequence[Batch], most_bytes: int = STATES_BYTES) -> None:
        """``most_bytes``: for hidden states; of those that take more, every second, third … layer's are kept."""
        self._task, self._batches = task, list(batches)
        self._layers = layers_of(model)
        self._layer_names = _names_of_layers(model)
        self._head_name = _name_of_head(model)
        self._stand_ins: list[SkippedLayer] = []
        self._states: list[dict[int, Tensor]] = []  # of every batch, by the layer that they enter
        self._wanted = [
            self._recorded(model, batch, most_bytes // max(1, len(self._batches))) for batch in self._batches
        ]
        self._sizes = [len(next(iter(batch.values()))) for batch in self._batches]

    @torch.inference_mode()
    def __call__(self, model: nn.Module, changed: Collection[str] = ()) -> float:
        """Divergence of the model as it is now.

        Args:
            model: the same one; what was changed in it is put in place.
            changed: paths of the modules that differ from before; none: any may.
        """
        first = min((self._first_layer(path) for path in changed), default=0)
        total = 0.0
        for batch, states, wanted, size in zip(self._batches, self._states, self._wanted, self._sizes, strict=True):
            start = max((layer for layer in states if layer <= first), default=0)
            with layers_skipped(self._layers, self._stand_ins[:start], states.get(start)):
                total += size * float(self._task.divergence(self._task.compared(model, batch), wanted))
        return total / sum(self._sizes)

    def _first_layer(self, path: str) -> int:
        """The first layer that a change of this module reaches; as many as there are layers: none."""
        for index, name in enumerate(self._layer_names):
            if path == name or path.startswith(f"{name}."):
                return index
        return len(self._layers) if path == self._head_name else 0

    @torch.inference_mode()
    def _recorded(self, model: nn.Module, batch: Batch, most_bytes: int) -> Tensor:
        """Answers to a batch; notes the hidden states that enter the layers, and the last layer's."""
        states: dict[int, Tensor] = {}
        outputs: dict[int, Any] = {}

        def entering(index: int) -> Any:
            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states[index] = layer_input(args, kwargs)

            return record

        def leaving(index: int) -> Any:
            def record(_: nn.Module, __: Any, output: Any) -> None:
                outputs[index] = output

            return record

        handles = [each.register_forward_pre_hook(entering(i), with_kwargs=True) for i, each in enumerate(self._layers)]
        handles += [each.register_forward_hook(leaving(i)) for i, each in enumerate(self._layers)]
        try:
            answers = self._task.compared(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not self._stand_ins:
            self._stand_ins = [SkippedLayer(outputs[index], layer) for index, layer in enumerate(self._layers)]
        last = outputs[len(self._layers) - 1]
        states[len(self._layers)] = last[0] if isinstance(last, tuple) else last
        step = max(
            1, math.ceil(sum(each.numel() * each.element_size() for each in states.values()) / max(1, most_bytes))
        )
        self._states.append({layer: each for layer, each in states.items() if layer and layer % step == 0})
        return answers


def _names_of_layers(model: nn.Module) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers_of(model)]


def _name_of_head(model: nn.Module) -> str | None:
    """Path of what makes logits of a language model, None where there is none."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is output), None)
