"""A model as the modules that can be pruned, two a layer, and where in the model each has its linear."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig

from ziplm_deploy.documents import shortened
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.architectures import Architecture, architecture_of
from ziplm_deploy.models.shape import ModelShape, ModuleId, ModuleKind


@dataclass(frozen=True)
class PrunableModule:
    """Attention (structures: heads) or FFN (structures: columns) of one layer."""

    layer: int
    kind: ModuleKind
    structures: int  # 0: the module was dropped
    group_size: int  # columns of the output linear that leave with one structure: of all its query heads, or 1
    key_size: int = 0  # rows of the key and value projections that leave with it: head_dim; an FFN has none

    @property
    def name(self) -> str:
        return str(ModuleId(self.layer, self.kind))


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
        queries = shape.head_dim * shape.queries_per_head
        modules.append(PrunableModule(layer, "attention", shape.n_heads, queries, shape.head_dim))
        modules.append(PrunableModule(layer, "ffn", shape.intermediate_size, 1))
    return modules


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layer list of a model, with or without a task head."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    layers = model.base_model.get_submodule(architecture.layers)  # type: ignore[union-attr]
    assert isinstance(layers, nn.ModuleList)
    return layers


def attention_kind(layer: nn.Module) -> str | None:
    """Name of the attention that a layer has, where its model has several and gives each its own inputs."""
    kind: str | None = getattr(layer, "attention_type", None)
    return kind


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the layers that tokens pass, by its dotted name in ``model``, in the order of the model.

    Query, key, value, attention output and those of the FFN; a dropped module has none. Projections of positions alone
    are none of them: what they give is a constant.
    """
    layers = layers_of(model)
    positions = architecture_of(model.config).position_projections  # type: ignore[arg-type]
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in positions
    }


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
        raise UnsupportedModelError(
            f"expected an output linear in module {module.name}, found none: it was dropped; leave it out"
        )
    return linear


def output_module(model: nn.Module, module: PrunableModule) -> nn.Module:
    """The output linear, or what stands in its place in a dropped module and has only a ``bias`` ``[hidden]``."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    layer = layers_of(model)[module.layer]
    try:
        return layer.get_submodule(architecture.output(module.kind))
    except AttributeError:
        return layer.get_submodule(architecture.block(module.kind))


def output_bias_name(model: nn.Module, module: PrunableModule) -> str:
    """Name that the bias of a module's output linear has, or would have, among the model's parameters."""
    layers, linear = layers_of(model), output_linear(model, module)
    prefix = next(name for name, each in model.named_modules() if each is layers)
    path = next(name for name, each in layers[module.layer].named_modules() if each is linear)
    return f"{prefix}.{module.layer}.{path}.bias"


def residual_module(model: nn.Module, module: PrunableModule) -> nn.Module:
    """The sub-module whose first input is the residual that this module's output is added to."""
    layer = layers_of(model)[module.layer]
    if module.kind == "attention":
        return layer
    return layer.get_submodule(architecture_of(model.config).ffn_residual)  # type: ignore[arg-type]


def is_parallel(model: nn.Module) -> bool:
    """Whether the FFN of a layer reads what its attention reads, and the sum of both is added to the residual."""
    causal = architecture_of(model.config).causal  # type: ignore[arg-type]
    return causal is not None and causal.parallel is not None and bool(getattr(model.config, causal.parallel))


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Dimensions of a configuration.

    Raises:
        UnsupportedModelError: like :func:`architecture_of`.  CorruptArtifactError: they are none of a model.
    """
    architecture = architecture_of(config)
    n_queries, hidden = config.num_attention_heads, config.hidden_size
    n_heads = getattr(config, architecture.config_kv_heads or "", None) or n_queries
    try:
        return ModelShape(
            model_type=config.model_type,
            n_layers=getattr(config, architecture.config_layers),
            hidden_size=hidden,
            n_heads=n_heads,
            head_dim=getattr(config, "head_dim", None) or hidden // n_queries,
            intermediate_size=_ffn_width(config, architecture),
            queries_per_head=n_queries // n_heads,
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        wrong = error.errors() if isinstance(error, ValidationError) else []
        found = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in wrong) or str(error)
        raise CorruptArtifactError(
            f"expected the sizes of a {config.model_type} model in its configuration, found {shortened(found)}; copy "
            "config.json again"
        ) from error


def _ffn_width(config: PretrainedConfig, architecture: Architecture) -> int:
    if architecture.config_ffn_ratio is not None:
        return int(config.hidden_size * getattr(config, architecture.config_ffn_ratio))
    width: int | None = getattr(config, architecture.config_ffn_width or "", None)
    return width or 4 * int(config.hidden_size)  # GPT-2 leaves it open
