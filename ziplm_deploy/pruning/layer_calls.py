"""A model's layers run one at a time: how the model calls them, and what stands at a module in such a call.

Hidden states between layers are kept for all batches: a walk over all layers then costs one pass over the data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporters.heads import patches_of
from ziplm_deploy.models.layer_skipping import layer_input
from ziplm_deploy.models.modules import (
    PrunableModule,
    attention_kind,
    layers_of,
    model_shape,
    output_module,
    residual_module,
)
from ziplm_deploy.pruning.moments import InputMoments, Moments
from ziplm_deploy.tasks.batching import Batch, rows_that_count

HELD_OUT_EVERY = 5
STREAM_BYTES = 4 << 30  # that a walk keeps of hidden states and masks of all its batches
STATES = 5  # float32 numbers a hidden dimension and token: dense and pruned states, two targets, the layer's outputs
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named


@dataclass
class LayerCall:
    """Arguments of layers beside their hidden states, and the tokens that count.

    ``arguments``: by :func:`attention_kind` of a layer, since ModernBERT gives its local layers another mask and other
    angles than its global ones.
    """

    arguments: dict[str | None, Arguments]
    mask: Tensor  # [B, S] bool
    held_out: Tensor  # [N] bool, of the tokens that count

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``layer`` on these hidden states [B, S, d] and return those that it makes, [B, S, d]."""
        args, kwargs = self.arguments[attention_kind(layer)]
        output = layer(hidden, *args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def tokens(self, states: Tensor) -> Tensor:
        """Hidden states [B, S, d], or [B * S, d], as tokens [N, d], without padding."""
        return rows_that_count(states, self.mask)


class AllRecorded(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def that_fit(batches: Sequence[Batch], model: nn.Module, most_bytes: int = STREAM_BYTES) -> list[Batch]:
    """Batches for a walk over layers, which keeps the hidden states of all of them: every n-th, if all would not fit.

    ``most_bytes``: for states and attention masks; one batch is taken in any case.
    """
    hidden_size = model_shape(model.config).hidden_size  # type: ignore[arg-type]

    def n_bytes(batch: Batch) -> int:
        if "pixel_values" in batch:
            return 4 * len(batch["pixel_values"]) * (patches_of(model.config) + 1) * STATES * hidden_size
        rows, length = batch["input_ids"].shape
        return 4 * rows * length * (STATES * hidden_size + length)

    step = max(1, math.ceil(sum(map(n_bytes, batches)) / most_bytes))
    return list(batches[::step])


def capture_calls(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[LayerCall], list[Tensor]]:
    """How the model calls its layers, for every batch: the other arguments, and the first layer's hidden states.

    The model runs as far as to the first layer of the last kind: to its first layer, where all are of one kind.
    """
    calls: list[LayerCall] = []
    hidden: list[Tensor] = []
    arguments: dict[str | None, Arguments] = {}
    firsts: dict[str | None, nn.Module] = {}
    for layer in layers_of(model):
        firsts.setdefault(attention_kind(layer), layer)

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not arguments:
            hidden.append(layer_input(args, kwargs))
        rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "x")}
        arguments[attention_kind(layer)] = args[1:], rest
        if len(arguments) == len(firsts):
            raise AllRecorded

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in firsts.values()]
    try:
        for batch in batches:
            seen = sum(map(len, hidden))
            with contextlib.suppress(AllRecorded):
                model(**{k: v for k, v in batch.items() if k != "labels"})
            calls.append(LayerCall(dict(arguments), *_tokens(batch, hidden[-1], seen)))
            arguments.clear()
    finally:
        for handle in handles:
            handle.remove()
    return calls, hidden


def _tokens(batch: Batch, hidden: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """Which tokens count [B, S], and which of those are held out [N], after so many examples before."""
    B, S = hidden.shape[:2]
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(B, S, dtype=torch.bool)
    held_out = (torch.arange(seen, seen + B) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)[:, None]  # [B, 1]
    return mask, held_out.expand(B, S)[mask]


class ModuleTap:
    """Records input and output of a module's output linear and the residual it is added to, in one layer call.

    ``ends_call``: the call ends there, with :class:`AllRecorded`; what follows costs as much again.
    """

    def __init__(self, model: nn.Module, module: PrunableModule, *, ends_call: bool = False) -> None:
        self.x = self.y = self.residual = torch.empty(0)
        self._ends_call = ends_call
        self._handles = [
            output_module(model, module).register_forward_hook(self._linear),
            residual_module(model, module).register_forward_pre_hook(self._stream, with_kwargs=True),
        ]

    def _linear(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.y = output[0] if isinstance(output, tuple) else output
        if args:
            self.x = args[0]
        if self._ends_call:
            raise AllRecorded

    def _stream(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = layer_input(args, kwargs)

    def close(self) -> None:
        """Record no longer."""
        for handle in self._handles:
            handle.remove()


def input_moments(
    model: nn.Module, module: PrunableModule, calls: Sequence[LayerCall], hidden: Sequence[Tensor]
) -> InputMoments:
    """Moments of what enters a module's output linear when its layer gets these hidden states.

    Raises:
        DataError: no tokens.  NumericalError: NaN or infinite activations; names the module.
    """
    layer = layers_of(model)[module.layer]
    moments = Moments(module.name, module.structures * module.group_size)
    with contextlib.closing(ModuleTap(model, module, ends_call=True)) as tap:
        for call, states in zip(calls, hidden, strict=True):
            with contextlib.suppress(AllRecorded):
                call.run(layer, states)
            moments.add(call.tokens(tap.x))
    return moments.finish()
