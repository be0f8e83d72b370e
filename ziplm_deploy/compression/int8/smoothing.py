"""Inputs of linears made easier to round: a column of inputs is divided by what its weights are multiplied with.

======  =============  =====================================================================
symbol  shape          meaning
======  =============  =====================================================================
x       [tokens, in]   inputs of some linears
W       [out, in]      their weights
α       number         strength: 0 leaves inputs as they are, 1 makes all columns alike
s       [in]           max |x_j|^α / max |W_j|^(1 − α), of all the linears that read x
======  =============  =====================================================================

That is equation 4 of SmoothQuant (Xiao et al. 2023). The division goes into what makes x, so that a model has no
further operation and computes the same: into the norm before a block's first linears, into the rows of values before
the output of attention, and into those of the second factor of a gated FFN (of the first linear of one with ReLU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ziplm_deploy.compression.int8.fake_quant import (
    insert_fake_quant,
    module_ranges,
    quantizable_linears,
    remove_fake_quant,
    watch_inputs,
)
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import layers_of, model_shape
from ziplm_deploy.progress import StepProgress

SiteKind = Literal["ffn", "attention", "norms"]
KINDS: tuple[SiteKind, ...] = ("ffn", "attention", "norms")  # those first whose inputs are the most massive
STRENGTHS = (0.5, 0.7, 0.85)
FLOOR = 0.05  # of the mean over columns: what was hardly seen may be larger in other text

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Site:
    """Linears that read one tensor, and the module whose rows, or whose weight, make its columns; by module path."""

    kind: SiteKind
    source: str
    readers: tuple[str, ...]


def smoothing_sites(model: nn.Module) -> list[Site]:
    """Where the inputs of a causal language model's linears can be scaled; blocks that were dropped have none."""
    architecture: Any = architecture_of(model.config)  # type: ignore[arg-type]
    linears, layers = quantizable_linears(model), layers_of(model)
    modules = dict(model.named_modules())
    prefix = next(name for name, module in modules.items() if module is layers)
    config: Any = model.config
    names = (getattr(config, "hidden_act", None), getattr(config, "activation_function", None))
    scales_through = architecture.ffn_gate is not None or "relu" in names
    sites = []
    for index in range(len(layers)):

        def path(*parts: str | None, index: int = index) -> str:
            return ".".join(filter(None, (prefix, str(index), *parts)))

        attention = [path(architecture.attention, name) for name in _projections(architecture)]
        ffn = [
            path(architecture.ffn, name) for name in (architecture.ffn_input, architecture.ffn_gate) if name is not None
        ]
        sites += [
            Site("norms", path(norm), tuple(readers))
            for norm, readers in ((architecture.attention_norm, attention), (architecture.ffn_norm, ffn))
            if norm is not None
        ]
        if scales_through:
            sites.append(Site("ffn", ffn[0], (path(architecture.ffn_output),)))
        if architecture.fused is None:
            sites.append(Site("attention", attention[-1], (path(architecture.attention_output),)))
    return [
        site
        for site in sites
        if all(name in linears for name in site.readers) and isinstance(_weight(modules.get(site.source)), Tensor)
    ]


def column_maxima(model: nn.Module, batches: Batches, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Largest magnitude of every column, float32 [in], of what the readers of each site read; by the first of them."""
    linears = quantizable_linears(model)
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        largest = x.detach().float().abs().reshape(-1, x.shape[-1]).amax(0)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    watch_inputs(model, batches, {site.readers[0]: linears[site.readers[0]] for site in sites}, look)
    return found


def smooth(model: nn.Module, sites: Sequence[Site], maxima: Mapping[str, Tensor], strength: float) -> list[Tensor]:
    """Scale inputs and weights of these sites, in place; what each source was divided by, for :func:`unsmooth`."""
    scales = [_scales(model, site, maxima[site.readers[0]], strength) for site in sites]
    for site, scale in zip(sites, scales, strict=True):
        _apply(model, site, scale)
    return scales


def unsmooth(model: nn.Module, sites: Sequence[Site], scales: Sequence[Tensor]) -> None:
    """Undo :func:`smooth`, but for rounding."""
    for site, scale in zip(sites, scales, strict=True):
        _apply(model, site, 1 / scale)


def smooth_as_chosen(model: nn.Module, batches: Batches, strengths: Mapping[str, float]) -> None:
    """Scale a model in place as :func:`choose_strengths` found it best, on the same batches."""
    sites = smoothing_sites(model)
    maxima = column_maxima(model, batches, sites)
    for kind in KINDS:  # the scales of norms look at weights that were scaled before
        if kind in strengths:
            smooth(model, [site for site in sites if site.kind == kind], maxima, strengths[kind])


def choose_strengths(
    model: nn.Module,
    batches: Batches,
    judged: Batches,
    divergence: Callable[[nn.Module], float],
    settings: Int8Settings,
    leave_out: Collection[str] = (),
    progress: StepProgress | None = None,
) -> dict[str, float]:
    """Strength of each kind of sites under which INT8 changes answers least; none where that is least.

    The model has the scales of these strengths afterwards; :func:`smooth_as_chosen` gives them to another copy.

    Args:
        batches: inputs that maxima are taken from.
        judged: other inputs, those of ``divergence``: INT8 finds its ranges at run time.
        divergence: of the model as it is now from the float32 model.
        leave_out: module paths of linears that do not become INT8, and have no part in the choice.
        progress: called with (strengths tried, of how many).
    """
    sites = smoothing_sites(model)
    maxima = column_maxima(model, batches, sites)
    kinds = [kind for kind in KINDS if any(s.kind == kind and not set(s.readers) <= set(leave_out) for s in sites)]
    least = _in_int8(model, judged, divergence, settings, leave_out)
    chosen: dict[str, float] = {}
    for done, kind in enumerate(kinds):
        own = [site for site in sites if site.kind == kind]
        for tried, strength in enumerate(STRENGTHS, 1):
            scales = smooth(model, own, maxima, strength)
            value = _in_int8(model, judged, divergence, settings, leave_out)
            unsmooth(model, own, scales)
            if value < least:
                least, chosen[kind] = value, strength
            if progress is not None:
                progress(done * len(STRENGTHS) + tried, len(kinds) * len(STRENGTHS))
        if kind in chosen:
            smooth(model, own, maxima, chosen[kind])
    return chosen


def _in_int8(
    model: nn.Module,
    batches: Batches,
    divergence: Callable[[nn.Module], float],
    settings: Int8Settings,
    leave_out: Collection[str] = (),
) -> float:
    """Divergence with all linears in INT8 but some; infinite where it is no number."""
    insert_fake_quant(model, module_ranges(model, batches), settings, keep_fp32=leave_out)
    try:
        value = float(divergence(model))
    finally:
        remove_fake_quant(model)
    return value if math.isfinite(value) else math.inf


def _projections(architecture: Any) -> tuple[str, ...]:
    """Names of the linears that make queries, keys and values, the last one values; one where they are fused."""
    fused = architecture.fused is not None
    return (architecture.query,) if fused else (architecture.query, architecture.key, architecture.value)


def _weight(module: nn.Module | None) -> Any:
    return getattr(module, "weight", None)


def _scales(model: nn.Module, site: Site, maxima: Tensor, strength: float) -> Tensor:
    """What the source of a site is divided by, float32 [rows]: one for all columns that a row makes."""
    readers = [_weight(model.get_submodule(name)).detach().float() for name in site.readers]
    weights = torch.stack([reader.abs().amax(0) for reader in readers]).amax(0)  # [in]
    n_rows = len(_weight(model.get_submodule(site.source)))
    x, w = (_by_row(values, n_rows, model).amax(1).flatten() for values in (maxima, weights))
    x = torch.maximum(x, FLOOR * x.mean())
    scale = x**strength / w ** (1 - strength)
    usable = (x > 0) & (w > 0) & torch.isfinite(scale) & (scale > 0)
    scale = torch.where(usable, scale, torch.ones_like(scale))
    mean = scale[usable].log().mean().exp() if bool(usable.any()) else torch.ones(())
    return torch.where(usable, scale / mean, scale)


def _by_row(columns: Tensor, n_rows: int, model: nn.Module) -> Tensor:
    """Columns ``[groups, copies, width]`` whose rows are ``[groups, width]``: query heads that read one value."""
    copies = len(columns) // n_rows
    width = n_rows if copies == 1 else model_shape(model.config).head_dim  # type: ignore[arg-type]
    return columns.reshape(-1, copies, width)


@torch.no_grad()
def _apply(model: nn.Module, site: Site, scale: Tensor) -> None:
    """Divide the source by ``scale`` [rows], and multiply the columns of its readers."""
    source: Any = model.get_submodule(site.source)
    rows = scale.to(source.weight)
    source.weight.div_(rows if source.weight.ndim == 1 else rows[:, None])
    if getattr(source, "bias", None) is not None:
        source.bias.div_(rows)
    for name in site.readers:
        weight: Any = _weight(model.get_submodule(name))  # [out, in]
        groups, copies, width = _by_row(weight[0], len(scale), model).shape
        columns = scale.reshape(groups, 1, width).expand(-1, copies, -1).flatten()  # [in]
        weight.mul_(columns.to(weight))
