"""The only file that knows attribute paths of Hugging Face models.

An architecture is one declarative entry: where the layers are, and inside a layer where the attention block, the
FFN block and their output linears are. ``ffn`` is the smallest block that owns the first FFN linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from ziplm_deploy.artifacts import ModelShape, ModuleKind
from ziplm_deploy.errors import UnsupportedModelError


class HeadSlicedMPNetAttention(MPNetSelfAttention):
    """MPNet attention with fewer heads: the shared position bias ``[1, heads, q, k]`` is cut to the kept heads."""

    kept_heads: torch.Tensor  # int64 [k], buffer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if position_bias is not None:
            position_bias = position_bias.index_select(1, self.kept_heads)  # [1, k, q, k_len]
        outputs: tuple[torch.Tensor, ...] = super().forward(  # type: ignore[no-untyped-call]
            hidden_states, attention_mask, head_mask, position_bias, output_attentions, **kwargs
        )
        return outputs


@dataclass(frozen=True)
class Architecture:
    """Attribute paths of one ``model_type``; the defaults are BERT's. Paths are relative to a layer."""

    model_type: str
    layers: str = "encoder.layer"  # relative to the base model
    attention: str = "attention.self"  # owns query, key, value and the head count
    query: str = "query"  # relative to `attention`
    key: str = "key"
    value: str = "value"
    head_count: str = "num_attention_heads"  # attributes of `attention` that its views use
    head_width: str = "all_head_size"
    attention_output: str = "attention.output.dense"
    ffn: str = "intermediate"
    ffn_input: str = "dense"  # relative to `ffn`
    ffn_output: str = "output.dense"
    ffn_residual: str = "intermediate"  # its first input is what the FFN's output is added to
    attention_norm: str | None = None  # LayerNorm before the block (pre-LN): nobody reads it if the block is dropped
    ffn_norm: str | None = None
    config_layers: str = "num_hidden_layers"
    config_ffn_width: str = "intermediate_size"
    sliced_attention: type[nn.Module] | None = None  # class of an attention block with fewer heads

    def block(self, kind: ModuleKind) -> str:
        """Path of the block that is replaced when a module of this kind shrinks."""
        return self.attention if kind == "attention" else self.ffn

    def output(self, kind: ModuleKind) -> str:
        """Path of the linear whose columns are pruned: attention output projection or second FFN linear."""
        return self.attention_output if kind == "attention" else self.ffn_output

    def norm(self, kind: ModuleKind) -> str | None:
        """Path of the LayerNorm that only this kind of module reads; ``None`` in post-LN models."""
        return self.attention_norm if kind == "attention" else self.ffn_norm

    def output_in_block(self, kind: ModuleKind) -> str | None:
        """Path of the output linear relative to the block, or ``None`` if it lies outside of it."""
        prefix = self.block(kind) + "."
        output = self.output(kind)
        return output.removeprefix(prefix) if output.startswith(prefix) else None


_ENTRIES = (
    Architecture("bert"),
    Architecture("roberta"),
    Architecture("xlm-roberta"),
    Architecture("electra"),
    Architecture(
        "distilbert",
        layers="transformer.layer",
        attention="attention",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        head_count="n_heads",
        head_width="dim",
        attention_output="attention.out_lin",
        ffn="ffn",
        ffn_input="lin1",
        ffn_output="ffn.lin2",
        ffn_residual="ffn",
        config_layers="n_layers",
        config_ffn_width="hidden_dim",
    ),
    Architecture(
        "mpnet",
        attention="attention.attn",
        query="q",
        key="k",
        value="v",
        attention_output="attention.attn.o",
        sliced_attention=HeadSlicedMPNetAttention,
    ),
    Architecture(
        "vit",
        attention="attention.attention",
        ffn_residual="layernorm_after",
        attention_norm="layernorm_before",
        ffn_norm="layernorm_after",
    ),
)
_BY_TYPE = {entry.model_type: entry for entry in _ENTRIES}
SUPPORTED: tuple[str, ...] = tuple(_BY_TYPE)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Entry of a model's configuration.

    Raises:
        UnsupportedModelError: another architecture, or a variant of a supported one whose layers differ
            (decoder, relative positions, …); names what is supported and why this one is refused.
    """
    reason = _why_not(config)
    if reason is not None:
        raise UnsupportedModelError(
            f"expected an encoder of type {', '.join(SUPPORTED)} with plain self-attention, found {reason}; "
            "choose a supported model"
        )
    return _BY_TYPE[config.model_type]


def _why_not(config: PretrainedConfig) -> str | None:
    model_type = getattr(config, "model_type", "") or type(config).__name__
    if model_type not in _BY_TYPE:
        return f"model type {model_type!r}"
    if getattr(config, "is_decoder", False):
        return f"a {model_type} decoder (is_decoder: true): its cached keys and values cannot be resized here"
    if getattr(config, "add_cross_attention", False):
        return f"a {model_type} with cross-attention (add_cross_attention: true)"
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions not in (None, "absolute"):
        return f"a {model_type} with position_embedding_type {positions!r}: its attention scores depend on the head"
    if getattr(config, "chunk_size_feed_forward", 0):
        return f"chunk_size_feed_forward {config.chunk_size_feed_forward}: set it to 0, it only saves training memory"
    if getattr(config, "pruned_heads", None):
        return f"a {model_type} whose heads were pruned before (pruned_heads): save it without them"
    if config.hidden_size % config.num_attention_heads:
        return f"hidden_size {config.hidden_size} that {config.num_attention_heads} heads do not divide"
    return None


@dataclass(frozen=True)
class PrunableModule:
    """Attention (structures: heads) or FFN (structures: columns) of one layer."""

    layer: int
    kind: ModuleKind
    structures: int  # 0: the module was dropped
    group_size: int  # columns of the output linear that leave with one structure: head_dim, or 1

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"


def prunable_modules(model: nn.Module) -> list[PrunableModule]:
    """Every prunable module of a model as it is now, in the order ``0.attention, 0.ffn, 1.attention, …``.

    A resized model's modules have as many structures as were kept; a dropped one stays in the list with none.
    """
    kept: dict[str, list[int]] = getattr(model, "ziplm_kept", {})
    return [
        replace(module, structures=len(kept[module.name])) if module.name in kept else module
        for module in dense_modules(model)
    ]


def dense_modules(model: nn.Module) -> list[PrunableModule]:
    """The modules that a model had before anything was removed; same order as :func:`prunable_modules`."""
    shape = model_shape(model.config)  # type: ignore[arg-type]
    modules: list[PrunableModule] = []
    for layer in range(shape.n_layers):
        modules.append(PrunableModule(layer, "attention", shape.n_heads, shape.head_dim))
        modules.append(PrunableModule(layer, "ffn", shape.intermediate_size, 1))
    return modules


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layer list of a model, with or without a task head."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    layers = model.base_model.get_submodule(architecture.layers)  # type: ignore[union-attr]
    assert isinstance(layers, nn.ModuleList)
    return layers


def output_linear(model: nn.Module, module: PrunableModule) -> nn.Linear:
    """The linear whose input columns are pruned, ``[hidden, structures * group_size]``.

    Raises:
        UnsupportedModelError: the module was dropped, so it has no linear.
    """
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    try:
        linear = layers_of(model)[module.layer].get_submodule(architecture.output(module.kind))
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise UnsupportedModelError(f"expected an output linear in module {module.name}, found none: it was dropped")
    return linear


def output_module(model: nn.Module, module: PrunableModule) -> nn.Module:
    """The output linear, or what stands in its place in a dropped module; has a ``bias`` ``[hidden]`` either way."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    layer = layers_of(model)[module.layer]
    try:
        return layer.get_submodule(architecture.output(module.kind))
    except AttributeError:
        return layer.get_submodule(architecture.block(module.kind))


def residual_module(model: nn.Module, module: PrunableModule) -> nn.Module:
    """The sub-module whose first input is the residual that this module's output is added to."""
    layer = layers_of(model)[module.layer]
    if module.kind == "attention":
        return layer
    return layer.get_submodule(architecture_of(model.config).ffn_residual)  # type: ignore[arg-type]


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Dimensions of a configuration; raises :class:`UnsupportedModelError` like :func:`architecture_of`."""
    architecture = architecture_of(config)
    return ModelShape(
        model_type=config.model_type,
        n_layers=getattr(config, architecture.config_layers),
        hidden_size=config.hidden_size,
        n_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate_size=getattr(config, architecture.config_ffn_width),
    )


def inspect_model(model_or_config: nn.Module | PretrainedConfig) -> list[dict[str, Any]]:
    """One row a layer: ``layer, heads, head_dim, ffn_width, parameters, prunable, reason``.

    An unsupported model gives a single row with ``prunable: False`` and the reason instead of an error.
    """
    config: Any = model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config
    reason = _why_not(config)
    if reason is not None:
        why = f"{reason}; supported: {', '.join(SUPPORTED)}"
        return [
            {"layer": None, "heads": None, "head_dim": None, "ffn_width": None, "parameters": None}
            | {"prunable": False, "reason": why}
        ]
    shape = model_shape(config)
    kept: dict[str, list[int]] = getattr(model_or_config, "ziplm_kept", {})
    rows: list[dict[str, Any]] = []
    for layer in range(shape.n_layers):
        heads = len(kept.get(f"{layer}.attention", range(shape.n_heads)))
        width = len(kept.get(f"{layer}.ffn", range(shape.intermediate_size)))
        parameters = _layer_parameters(model_or_config, layer, shape)
        rows.append(
            {"layer": layer, "heads": heads, "head_dim": shape.head_dim, "ffn_width": width, "parameters": parameters}
            | {"prunable": True, "reason": ""}
        )
    return rows


def _layer_parameters(model_or_config: nn.Module | PretrainedConfig, layer: int, shape: ModelShape) -> int:
    if isinstance(model_or_config, nn.Module):
        return sum(parameter.numel() for parameter in layers_of(model_or_config)[layer].parameters())
    h, w = shape.hidden_size, shape.intermediate_size
    qkv_biases = 3 * h if getattr(model_or_config, "qkv_bias", True) else 0
    return 4 * h * h + h + qkv_biases + 2 * h * w + w + h + 4 * h  # two LayerNorms of 2 h each
