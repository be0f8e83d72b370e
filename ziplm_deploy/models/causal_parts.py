"""A causal language model taken apart into what writers of files need: :class:`DecoderParts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporters.decoder_parts import (
    Activation,
    AttentionPart,
    DecoderParts,
    DroppedPart,
    FeedForwardPart,
    LayerPart,
    LinearPart,
    NormPart,
    RotaryPart,
)
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.architectures.base import Architecture, CausalPaths
from ziplm_deploy.models.modules import is_parallel, layers_of, model_shape

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    "relu": "relu",
}


def causal_parts(model: nn.Module) -> DecoderParts:
    """The parts of a causal language model, dense or resized, with or without its head; tensors are the model's own.

    Raises:
        UnsupportedModelError: no causal language model, or one with an activation or rotary positions that no writer
            here knows.
    """
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    paths = architecture.causal
    if paths is None:
        raise UnsupportedModelError(
            f"expected a causal language model, found a {architecture.model_type}; encoders are exported as they are"
        )
    base: Any = model.base_model
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = base.get_submodule(paths.embedding).weight
    tied = head is None or (head.weight is embedding and head.bias is None)  # an encoder has none
    reader = _LayerReader(model, architecture, paths)
    return DecoderParts(
        embedding=embedding.detach(),
        positions=_positions(base, paths),
        layers=tuple(reader.layer(index) for index in range(len(layers_of(model)))),
        final_norm=_norm(base.get_submodule(paths.final_norm)),
        head=None if tied else _linear(head),
        rotary=_rotary(base, paths, model.config),
        max_positions=int(model.config.max_position_embeddings),  # type: ignore[union-attr, arg-type]
    )


class _LayerReader:
    """Reads the layers of one model."""

    def __init__(self, model: nn.Module, architecture: Architecture, paths: CausalPaths) -> None:
        self.architecture, self.paths = architecture, paths
        self.config: Any = model.config
        self.shape = model_shape(model.config)  # type: ignore[arg-type]
        self.layers = layers_of(model)
        self.parallel = is_parallel(model)

    def layer(self, index: int) -> LayerPart:
        """One layer; dropped blocks as what they leave on the stream."""
        layer, names = self.layers[index], self.architecture
        attention = _at(layer, names.attention_output) or layer.get_submodule(names.attention)
        feed_forward = _at(layer, names.ffn_output) or layer.get_submodule(names.ffn)
        return LayerPart(
            attention_norm=_norm_of(layer, names.attention_norm),
            attention=self._attention(layer, index) if isinstance(attention, nn.Linear) else _dropped(attention),
            feed_forward_norm=_norm_of(layer, names.ffn_norm),
            feed_forward=self._feed_forward(layer) if isinstance(feed_forward, nn.Linear) else _dropped(feed_forward),
            parallel=self.parallel,
        )

    def _attention(self, layer: nn.Module, index: int) -> AttentionPart:
        block, head_dim = layer.get_submodule(self.architecture.attention), self.shape.head_dim
        query, key, value = self._projections(block)
        norms = (self.paths.query_norm, self.paths.key_norm)
        query_norm, key_norm = (None if name is None else _norm(block.get_submodule(name)) for name in norms)
        return AttentionPart(
            query=query,
            key=key,
            value=value,
            output=_linear(layer.get_submodule(self.architecture.attention_output)),
            n_heads=len(query.weight) // head_dim,
            n_kv_heads=len(key.weight) // head_dim,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            query_norm=query_norm,
            key_norm=key_norm,
            window=_window(self.config, index) if self.paths.has_window else None,
        )

    def _projections(self, block: nn.Module) -> Sequence[LinearPart]:
        """Query, key and value."""
        names, head_dim = self.architecture, self.shape.head_dim
        if names.fused is None:
            return [_linear(block.get_submodule(name)) for name in (names.query, names.key, names.value)]
        whole = _linear(block.get_submodule(names.query))
        if names.fused == "thirds":
            rows = torch.arange(len(whole.weight)).reshape(3, -1)
        else:
            rows = torch.arange(len(whole.weight)).reshape(-1, 3, head_dim).transpose(0, 1).reshape(3, -1)
        return [LinearPart(whole.weight[r], None if whole.bias is None else whole.bias[r]) for r in rows]

    def _feed_forward(self, layer: nn.Module) -> FeedForwardPart:
        names = self.architecture
        block = layer.get_submodule(names.ffn)
        name = getattr(self.config, "hidden_act", None) or getattr(self.config, "activation_function", "")
        if name not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"expected an activation of {', '.join(_ACTIVATIONS)}, found {name!r}; no exporter here knows it"
            )
        return FeedForwardPart(
            up=_linear(block.get_submodule(names.ffn_input)),
            down=_linear(layer.get_submodule(names.ffn_output)),
            activation=_ACTIVATIONS[name],
            gate=None if names.ffn_gate is None else _linear(block.get_submodule(names.ffn_gate)),
        )


def _at(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _dropped(block: nn.Module) -> DroppedPart:
    bias = getattr(block, "bias", None)
    return DroppedPart(bias.detach() if isinstance(bias, Tensor) and bool(bias.any()) else None)


def _linear(module: nn.Module) -> LinearPart:
    assert isinstance(module, nn.Linear)
    return LinearPart(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _norm_of(layer: nn.Module, path: str | None) -> NormPart | None:
    module = None if path is None else layer.get_submodule(path)
    return None if module is None or isinstance(module, nn.Identity) else _norm(module)


def _norm(module: nn.Module) -> NormPart:
    weight: Any = module.weight
    if isinstance(module, nn.LayerNorm):
        bias = None if module.bias is None else module.bias.detach()
        return NormPart("layer", weight.detach(), module.eps, bias)
    epsilon: Any = module.variance_epsilon
    return NormPart("rms", weight.detach(), float(epsilon))


def _positions(base: nn.Module, paths: CausalPaths) -> Tensor | None:
    if paths.positions is None:
        return None
    table: Any = base.get_submodule(paths.positions).weight
    return table.detach()[paths.first_position :]  # type: ignore[no-any-return]


def _rotary(base: nn.Module, paths: CausalPaths, config: Any) -> RotaryPart | None:
    if paths.rotary is None:
        return None
    module: Any = base.get_submodule(paths.rotary)
    kind = getattr(module, "rope_type", "default")
    if kind in ("dynamic", "longrope"):  # their frequencies depend on the length of the text
        raise UnsupportedModelError(
            f"expected rotary positions of fixed frequencies, found rope_type {kind!r} in the {config.model_type}; set "
            "rope_scaling to null, which limits texts to the length that the model was pre-trained for"
        )
    return RotaryPart(module.inv_freq.detach().float(), float(module.attention_scaling))


def _window(config: Any, layer: int) -> int | None:
    """Tokens that a layer looks back over, itself included; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return None
    return int(window)
