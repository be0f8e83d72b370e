"""Which linears INT8 hurts, and why: the ranking by which some stay float32."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from exporters.nbits_matmul import BlockWeights
from ziplm_deploy.compression.int8.fake_quant import (
    insert_fake_quant,
    module_ranges,
    quantizable_linears,
    remove_fake_quant,
    watch_inputs,
)
from ziplm_deploy.compression.int8.forms import BITS
from ziplm_deploy.compression.int8.scales import ActivationRange
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.weight_only import weights_rounded
from ziplm_deploy.errors import NumericalError
from ziplm_deploy.progress import StepProgress

# All but one value in a thousand then share 255 / 16 ≈ 16 steps: 4 bits.
RUINOUS_OUTLIERS = 16.0
_SHARE = 0.999


@dataclass(frozen=True)
class SensitivityRow:
    """A linear, and what changes if it alone computes in INT8, or has 4-bit weights where the settings say so.

    The outlier ratios are the largest magnitude over the one that 99.9 % of the values do not pass: what the largest
    values cost the others in resolution. Weights are looked at for each scale; the worst counts.
    """

    name: str
    divergence: float
    activation_outliers: float
    weight_outliers: float
    by_form: Mapping[str, float] = field(default_factory=dict)  # divergence in each form, where all were looked at
    gptq: bool = False  # whether 4-bit weights change less if GPTQ rounds them than if each goes to the nearest

    @property
    def ruined_by_outliers(self) -> bool:
        """Whether fewer than about 4 bits are left for 99.9 % of the inputs or of the weights."""
        return max(self.activation_outliers, self.weight_outliers) > RUINOUS_OUTLIERS


def rank_linears(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    divergence: Callable[[nn.Module, Sequence[str]], float],
    settings: Int8Settings,
    progress: StepProgress | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    weight_only: Mapping[str, int] | None = None,
    gptq: Mapping[str, BlockWeights] | None = None,
) -> list[SensitivityRow]:
    """Every linear that can be quantized, the most sensitive first; the model is unchanged afterwards.

    Args:
        groups: by the name of each linear of the file, the module paths of those that it stands for; None: the same.
        batches: inputs that the ranges are taken from; gone through twice.
        divergence: of the model as it is now from the float32 model, given what was changed in it: a linear's paths.
        progress: called with (linears done, linears in all).
        weight_only: bits of those linears that get weight-only forms, by name, in place of INT8.
        gptq: by module path what 4-bit weights become by GPTQ; the better of the two ways counts.

    Raises:
        DataError: no data reached a linear.
        NumericalError: NaN or infinite activations, weights or divergence; names the linear.
    """
    linears = quantizable_linears(model)
    ranges = module_ranges(model, batches)
    outliers = _activation_outliers(model, batches, linears)
    rows = []
    groups = groups if groups is not None else {name: (name,) for name in linears}
    weight_only = weight_only or {}
    for done, (name, paths) in enumerate(groups.items(), start=1):
        per_channel = settings.config.per_channel
        weight = max(_weight_outliers(path, linears[path].weight.detach(), per_channel) for path in paths)
        by_gptq = False
        if name in weight_only:
            chosen, bits = [linears[path] for path in paths], weight_only[name]
            with weights_rounded(chosen, bits):
                value = float(divergence(model, paths))
            if bits == 4 and gptq and all(path in gptq for path in paths):
                with weights_rounded(chosen, bits, [gptq[path] for path in paths]):
                    other = float(divergence(model, paths))
                by_gptq = other < value or not math.isfinite(value)
                value = other if by_gptq else value
        else:
            value = _divergence_in_int8(model, divergence, ranges, settings, paths)
        if not math.isfinite(value):
            form = f"{weight_only[name]}-bit weights" if name in weight_only else "INT8"
            raise NumericalError(
                f"expected a finite divergence with {name} in {form}, found {value}; check the checkpoint and the data"
            )
        rows.append(SensitivityRow(name, value, max(outliers[path] for path in paths), weight, gptq=by_gptq))
        if progress is not None:
            progress(done, len(groups))
    return sorted(rows, key=lambda row: (-row.divergence, row.name))


def rank_in_all_forms(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    divergence: Callable[[nn.Module, Sequence[str]], float],
    settings: Int8Settings,
    groups: Mapping[str, Sequence[str]],
    progress: StepProgress | None = None,
    gptq: Mapping[str, BlockWeights] | None = None,
) -> list[SensitivityRow]:
    """Every linear, ranked as :func:`rank_linears` does, with its divergence in each form that is not float32.

    Linears of a file that stand for one of the model, as its fused queries, keys and values, share that of the whole.
    """
    forms: dict[str, dict[str, int]] = {
        "int8": {},
        **{form: dict.fromkeys(groups, bits) for form, bits in BITS.items()},
    }
    found: dict[str, dict[str, float]] = {name: {} for name in groups}
    rows: list[SensitivityRow] = []
    by_gptq: set[str] = set()
    for turn, (form, weight_only) in enumerate(forms.items()):

        def told(done: int, total: int, turn: int = turn) -> None:
            if progress is not None:
                progress(turn * total + done, len(forms) * total)

        ranked = rank_linears(model, batches, divergence, settings, told, groups, weight_only, gptq)
        by_gptq.update(row.name for row in ranked if row.gptq)
        rows = rows or ranked
        for row in ranked:
            found[row.name][form] = row.divergence
    sharing = Counter(tuple(paths) for paths in groups.values())
    return [
        replace(
            row,
            by_form={form: value / sharing[tuple(groups[row.name])] for form, value in found[row.name].items()},
            gptq=row.name in by_gptq,
        )
        for row in rows
    ]


def _divergence_in_int8(
    model: nn.Module,
    divergence: Callable[[nn.Module, Sequence[str]], float],
    ranges: Mapping[str, ActivationRange],
    settings: Int8Settings,
    paths: Sequence[str],
) -> float:
    others = [other for other in quantizable_linears(model) if other not in paths]
    insert_fake_quant(model, ranges, settings, keep_fp32=others)
    try:
        return float(divergence(model, paths))
    finally:
        remove_fake_quant(model)


def _activation_outliers(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], linears: Mapping[str, nn.Linear]
) -> dict[str, float]:
    """Largest magnitude over the mean, over batches, of the quantile; memory does not grow with the batches."""
    largest = dict.fromkeys(linears, 0.0)
    quantiles: dict[str, list[float]] = {name: [] for name in linears}

    def look(name: str, x: Tensor) -> None:
        magnitudes = x.abs().flatten()
        largest[name] = max(largest[name], float(magnitudes.max()))
        quantiles[name].append(_quantile(magnitudes))

    watch_inputs(model, batches, linears, look)
    return {
        name: _ratio(largest[name], sum(values) / len(values) if values else 0.0) for name, values in quantiles.items()
    }


def _weight_outliers(name: str, weight: Tensor, per_channel: bool) -> float:
    """Largest ratio of the largest to the quantile over the scales of a weight ``[out, in]``."""
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"expected finite weights of {name}, found NaN or infinity; check the checkpoint")
    rows = weight.abs() if per_channel else weight.abs().reshape(1, -1)
    return max(_ratio(float(row.max()), _quantile(row)) for row in rows)


def _quantile(magnitudes: Tensor) -> float:
    """What 99.9 % of the non-zero values [n], and at least all but one, do not pass. Zeros are exact at any scale."""
    values = magnitudes[magnitudes > 0]
    return float(values.kthvalue(max(1, int(_SHARE * len(values)))).values) if len(values) else 0.0


def _ratio(largest: float, quantile: float) -> float:
    if largest == 0:
        return 1.0
    return largest / quantile if quantile else math.inf
