"""A physically smaller torch model: fewer heads, narrower FFNs, dropped modules; masked ≡ resized.

A shrunk module is a :data:`Replacement`: a few new sub-modules and the paths inside the layer where they go. Which
paths those are depends only on the architecture and the kind, so one replacement undoes another and the search can
swap them hundreds of times. A dropped module keeps its residual connection (and the LayerNorm after it in post-LN
models) and adds its bias vector ``[hidden]``, which broadcasts over batch and tokens.

A model that was resized can be resized again: a level's ``kept`` counts the structures that the model has *now*, while
``ziplm_kept`` on the result always counts those of the original dense model.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from ziplm_deploy.errors import UsageError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.architectures.base import Architecture
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import (
    PrunableModule,
    dense_modules,
    layers_of,
    output_linear,
    output_module,
    prunable_modules,
)

Replacement = dict[str, nn.Module]
_Module = TypeVar("_Module", bound=nn.Module)


class BiasOnly(nn.Module):
    """Output linear of a dropped module: its bias ``[hidden]``, whatever the input; the residual sum broadcasts it."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.bias


class DroppedBlock(nn.Module):
    """A block whose output nobody reads: passes its input on, as first of a tuple if it stands for attention."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None) if self.returns_tuple else hidden_states


class DroppedAttention(BiasOnly):
    """A dropped attention block that owned its output linear (DistilBERT, MPNet, newer ViT)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.bias, None


class DroppedCachedAttention(DroppedAttention):
    """A dropped attention block of a causal language model, which still tells a cache how many tokens there were.

    transformers reads how long the text is so far from the cache of the first layer, whichever that is.
    """

    def __init__(self, bias: torch.Tensor, layer: int) -> None:
        super().__init__(bias)
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caches = (kwargs.get(name) for name in ("cache", "past_key_values", "past_key_value", "layer_past"))
        cache = next((each for each in (*caches, *args) if hasattr(each, "get_seq_length")), None)
        if cache is not None:
            batch, tokens, _ = hidden_states.shape
            count = hidden_states.new_zeros(batch, 1, tokens, 1)  # one number a token; a cache of none has no length
            cache.update(count, count, self.layer)
        return super().forward()


def build_replacement(model: nn.Module, module: PrunableModule, entry: LevelWeights) -> Replacement:
    """New sub-modules of ``module`` at the level ``entry``; ``model``, dense or resized, is not changed.

    Untouched parts (dropout, activation, LayerNorm) are shared with ``model``; every linear is new.

    Raises:
        UsageError: the entry's shapes or indices do not belong to this module, or it was dropped and the entry is not.
    """
    _check_entry(model, module, entry)
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    if entry.kept.numel() == 0:
        return _dropped(model, module, entry)
    layer = layers_of(model)[module.layer]
    block = _shell(layer.get_submodule(architecture.block(module.kind)))
    if module.kind == "attention":
        _keep_heads(architecture, block, module, entry.kept)
    else:
        block = _keep_columns(architecture, block, module, entry.kept)
    linear = output_linear(model, module)
    output = _linear(entry.weight, entry.bias if _needs_bias(linear, entry) else None, like=linear.weight)
    replacement: Replacement = {architecture.block(module.kind): block}
    inside, norm = architecture.output_in_block(module.kind), architecture.norm(module.kind)
    if inside is None:
        replacement[architecture.output(module.kind)] = output
    else:
        block._modules[inside] = output
    if norm is not None:
        replacement[norm] = layer.get_submodule(norm)
    return replacement


def install(model: nn.Module, layer: int, replacement: Replacement) -> None:
    """Put a replacement into a layer of ``model``; microseconds, no tensor is copied."""
    block = layers_of(model)[layer]
    for path, module in replacement.items():
        owner, _, name = path.rpartition(".")
        block.get_submodule(owner)._modules[name] = module


def shared_copy(model: _Module) -> _Module:
    """A copy whose modules are its own but whose parameters and buffers are those of ``model``: a place to swap."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(shared))


def resize(model: _Module, entries: dict[str, LevelWeights]) -> _Module:
    """A smaller model with every entry installed; modules without an entry stay. Shares nothing with ``model``.

    The kept indices are on the result as ``ziplm_kept: dict[str, list[int]]``, for all modules; they are those of the
    original dense model, also if ``model`` was resized before.

    Raises:
        UsageError: an entry does not belong to this model, or would bring a dropped module back.
    """
    stitched = shared_copy(model)
    modules = {module.name: module for module in prunable_modules(model)}
    _check_names(entries, modules)
    for name, entry in entries.items():
        install(stitched, modules[name].layer, build_replacement(model, modules[name], entry))
    resized = copy.deepcopy(stitched)
    kept = kept_structures(model)
    set_kept(resized, kept | {name: [kept[name][i] for i in entry.kept.tolist()] for name, entry in entries.items()})
    return resized


def set_kept(model: nn.Module, kept: dict[str, list[int]]) -> None:
    """Note the kept structures of every module, of the original dense model, on the model as ``ziplm_kept``."""
    full = {module.name: list(range(module.structures)) for module in dense_modules(model)}
    model.ziplm_kept = full | kept  # type: ignore[assignment]


def kept_structures(model: nn.Module) -> dict[str, list[int]]:
    """Kept structures per module, relative to the original dense model; all of them for a dense model."""
    kept: dict[str, list[int]] | None = getattr(model, "ziplm_kept", None)
    if kept is not None:
        return kept
    return {module.name: list(range(module.structures)) for module in dense_modules(model)}


def random_resized(model: _Module, sizes: dict[str, int]) -> _Module:
    """A resized copy that keeps the first ``size`` structures of each named module: for timing, not for accuracy."""
    modules = {module.name: module for module in prunable_modules(model)}
    _check_names(sizes, modules)
    return resize(model, {name: first_structures(model, modules[name], size) for name, size in sizes.items()})


def first_structures(model: nn.Module, module: PrunableModule, size: int) -> LevelWeights:
    """The level that keeps the first ``size`` structures with their current weights and bias."""
    if size == module.structures == 0:
        return dropped_as_is(model, module)
    linear = output_linear(model, module)
    weight = linear.weight.detach()[:, : size * module.group_size]  # [hidden, size * group]
    return LevelWeights(kept=torch.arange(size), weight=weight, bias=_bias(linear), relative_error=float("nan"))


def dropped_as_is(model: nn.Module, module: PrunableModule) -> LevelWeights:
    """The only level of a module that was dropped before: nothing kept, the bias that it has now, error 0."""
    bias = output_module(model, module).bias
    assert isinstance(bias, torch.Tensor)  # all that such a module has
    kept, weight = torch.zeros(0, dtype=torch.int64), torch.zeros(len(bias), 0)
    return LevelWeights(kept, weight, bias.detach().float().clone(), 0.0)


def masked(dense: _Module, entries: dict[str, LevelWeights]) -> _Module:
    """A full-size copy with zeros in the removed columns: the oracle that :func:`resize` must equal."""
    model = copy.deepcopy(dense)
    modules = {module.name: module for module in prunable_modules(dense)}
    _check_names(entries, modules)
    for name, entry in entries.items():
        _check_entry(dense, modules[name], entry)
        linear = output_linear(model, modules[name])
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[:, _columns(entry.kept, modules[name].group_size)] = entry.weight.to(linear.weight)
            linear.bias = nn.Parameter(entry.bias.to(linear.weight))
    return model


def _dropped(model: nn.Module, module: PrunableModule, entry: LevelWeights) -> Replacement:
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    block, output = architecture.block(module.kind), architecture.output(module.kind)
    norm = architecture.norm(module.kind)
    unread: Replacement = {norm: nn.Identity()} if norm is not None else {}
    if architecture.output_in_block(module.kind) is not None:
        owner = layers_of(model)[module.layer].get_submodule(block)
        return {block: _constant(architecture, module, entry.bias, owner), **unread}
    return {block: DroppedBlock(returns_tuple=module.kind == "attention"), output: BiasOnly(entry.bias), **unread}


def _constant(architecture: Architecture, module: PrunableModule, bias: torch.Tensor, block: nn.Module) -> nn.Module:
    """What stands for a block that owned its output linear, and only adds a bias now."""
    if module.kind == "ffn":
        return BiasOnly(bias)
    if architecture.dropped_attention is not None:
        return architecture.dropped_attention(bias, block)
    return DroppedAttention(bias) if architecture.causal is None else DroppedCachedAttention(bias, module.layer)


def _keep_heads(architecture: Architecture, block: nn.Module, module: PrunableModule, kept: torch.Tensor) -> None:
    projections = _projection_rows(architecture, module, kept)
    positions = [name for name in architecture.position_projections if name in block._modules]
    for name, rows in (projections | dict.fromkeys(positions, _columns(kept, module.key_size))).items():
        block._modules[name] = _keep_rows(block.get_submodule(name), rows)
    if architecture.head_count is not None:
        setattr(block, architecture.head_count, kept.numel())
    if architecture.head_width is not None:
        setattr(block, architecture.head_width, kept.numel() * module.group_size)
    if architecture.sliced_attention is not None and not torch.equal(kept, torch.arange(module.structures)):
        earlier = block._buffers.get("kept_heads")  # of the original heads: the position bias still has them all
        block.__class__ = architecture.sliced_attention
        block.register_buffer("kept_heads", kept.clone() if earlier is None else earlier[kept], persistent=False)


def _projection_rows(architecture: Architecture, module: PrunableModule, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of each projection of an attention block that the kept heads have."""
    queries, cached = _columns(kept, module.group_size), _columns(kept, module.key_size)
    if architecture.fused is None:
        return {architecture.query: queries, architecture.key: cached, architecture.value: cached}
    if architecture.fused == "heads":
        return {architecture.query: _columns(kept, 3 * module.key_size)}
    third = module.structures * module.key_size
    return {architecture.query: torch.cat([cached, cached + third, cached + 2 * third])}


def _keep_columns(
    architecture: Architecture, block: nn.Module, module: PrunableModule, kept: torch.Tensor
) -> nn.Module:
    """An FFN's block with the rows of the kept columns in its first linear, and in its gate."""
    rows = torch.cat([kept, kept + module.structures]) if architecture.ffn_fused else kept
    if not architecture.ffn_input:
        return _keep_rows(block, rows)
    for name in filter(None, (architecture.ffn_input, architecture.ffn_gate)):
        block._modules[name] = _keep_rows(block.get_submodule(name), rows)
    return block


def _needs_bias(linear: nn.Linear, entry: LevelWeights) -> bool:
    """Whether a linear with the weights of ``entry`` adds anything: models without biases get none of zeros."""
    return linear.bias is not None or bool(entry.bias.any())


def _shell(module: nn.Module) -> nn.Module:
    """A shallow copy with its own registries, so that changing its children leaves the original alone."""
    shell = copy.copy(module)
    for registry in ("_modules", "_parameters", "_buffers"):
        shell.__dict__[registry] = dict(module.__dict__[registry])
    shell._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return shell


def _keep_rows(linear: nn.Module, rows: torch.Tensor) -> nn.Linear:
    assert isinstance(linear, nn.Linear)
    bias = None if linear.bias is None else linear.bias.detach()[rows]
    return _linear(linear.weight.detach()[rows], bias, like=linear.weight)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    # The meta device skips the random initialization, which costs more than the copy.
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(like).clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(like).clone())
    return linear


def _columns(kept: torch.Tensor, group_size: int) -> torch.Tensor:
    """Column (or row) indices ``[k * group]`` of the kept structures ``[k]``."""
    return (kept[:, None] * group_size + torch.arange(group_size)).flatten()


def _bias(linear: nn.Linear) -> torch.Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def _check_names(names: dict[str, Any], modules: dict[str, PrunableModule]) -> None:
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise UsageError(
            f"expected modules among {next(iter(modules), 'none')} … {list(modules)[-1] if modules else 'none'}, "
            f"found {', '.join(unknown)}; the plan belongs to another model"
        )


def _check_entry(model: nn.Module, module: PrunableModule, entry: LevelWeights) -> None:
    kept = entry.kept
    if kept.numel() and not module.structures:
        raise UsageError(
            f"expected no structures for {module.name}, which was dropped, found {kept.tolist()}; "
            "it cannot come back: give it size 0, or start from the dense model"
        )
    hidden: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    expected = (hidden, kept.numel() * module.group_size)
    if tuple(entry.weight.shape) != expected or tuple(entry.bias.shape) != (hidden,):
        raise UsageError(
            f"expected weight {expected} and bias ({hidden},) for {module.name}, found {tuple(entry.weight.shape)} "
            f"and {tuple(entry.bias.shape)}; the level belongs to another model"
        )
    if kept.numel() and (kept.min() < 0 or kept.max() >= module.structures or len(set(kept.tolist())) != kept.numel()):
        raise UsageError(
            f"expected distinct structures in 0..{module.structures - 1} for {module.name}, found {kept.tolist()}; "
            "the level belongs to another model"
        )
