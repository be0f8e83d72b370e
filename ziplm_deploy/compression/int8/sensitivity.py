"""Which linears INT8 hurts, why, and which must stay float32 to hold an accuracy budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ziplm_deploy.compression.int8.fake_quant import (
    insert_fake_quant,
    module_ranges,
    quantizable_linears,
    remove_fake_quant,
    watch_inputs,
)
from ziplm_deploy.errors import NumericalError, UsageError
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.recipe import Int8Config

# All but one value in a thousand then share 255 / 16 ≈ 16 steps: 4 bits.
RUINOUS_OUTLIERS = 16.0


_SHARE = 0.999


@dataclass(frozen=True)
class SensitivityRow:
    """A linear, and what changes if it alone computes in INT8.

    The outlier ratios are the largest magnitude over the one that 99.9 % of the values do not pass: what the largest
    values cost the others in resolution. Weights are looked at for each scale; the worst counts.
    """

    name: str
    divergence: float
    activation_outliers: float
    weight_outliers: float

    @property
    def ruined_by_outliers(self) -> bool:
        """Whether fewer than about 4 bits are left for 99.9 % of the inputs or of the weights."""
        return max(self.activation_outliers, self.weight_outliers) > RUINOUS_OUTLIERS


@dataclass(frozen=True)
class Fp32Choice:
    """Which linears stay float32, and whether that holds the budget.

    ``tried``: (number kept, score) in the order of the search. If the budget does not hold, ``kept`` is what scored
    best, with the fewest linears.
    """

    kept: tuple[str, ...]
    score: float
    reference_score: float
    tried: tuple[tuple[int, float], ...]
    within_budget: bool


def rank_linears(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    divergence: Callable[[nn.Module], float],
    config: Int8Config,
    reduce_range: bool,
    progress: StepProgress | None = None,
) -> list[SensitivityRow]:
    """Every linear of the encoder's layers, the most sensitive first; the model is unchanged afterwards.

    Args:
        batches: inputs that the ranges are taken from; gone through twice.
        divergence: of the model as it is now from the float32 model; called once a linear.
        progress: called after every linear.

    Raises:
        DataError: no data reached a linear.
        NumericalError: NaN or infinite activations, weights or divergence; names the linear.
    """
    linears = quantizable_linears(model)
    ranges = module_ranges(model, batches)
    outliers = _activation_outliers(model, batches, linears)
    rows = []
    for done, (name, linear) in enumerate(linears.items(), start=1):
        weight = _weight_outliers(name, linear.weight.detach(), config.per_channel)
        others = [other for other in linears if other != name]
        insert_fake_quant(model, ranges, config, reduce_range, keep_fp32=others)
        try:
            value = float(divergence(model))
        finally:
            remove_fake_quant(model)
        if not math.isfinite(value):
            raise NumericalError(f"expected a finite divergence with {name} in INT8, found {value}")
        rows.append(SensitivityRow(name, value, outliers[name], weight))
        if progress is not None:
            progress(done, len(linears))
    return sorted(rows, key=lambda row: (-row.divergence, row.name))


def keep_in_fp32(
    rows: Sequence[SensitivityRow],
    evaluate: Callable[[tuple[str, ...]], float],
    reference_score: float,
    config: Int8Config,
) -> Fp32Choice:
    """Leave 0, 1, 2, 4, … of the most sensitive linears in float32 until the loss is within ``config.max_loss``.

    The last number tried is ``config.max_fp32_share`` of the linears, or all but one.

    Args:
        rows: the most sensitive first, as :func:`rank_linears` returns them.
        evaluate: score, higher is better, of the quantized file with these linears in float32.
        reference_score: of the model before INT8.

    Raises:
        UsageError: no rows.  NumericalError: a score is not finite.
    """
    if not rows:
        raise UsageError("expected linears to choose from, found none; make the sensitivity listing first")
    _check_score("of the model before INT8", reference_score)
    names = tuple(row.name for row in rows)
    tried: list[tuple[int, float]] = []
    for count in _counts(min(int(config.max_fp32_share * len(names)), len(names) - 1)):
        score = evaluate(names[:count])
        _check_score(f"with {count} linear(s) in float32", score)
        tried.append((count, score))
        if reference_score - score <= config.max_loss * abs(reference_score):
            return Fp32Choice(names[:count], score, reference_score, tuple(tried), within_budget=True)
    count, score = max(tried, key=lambda item: (item[1], -item[0]))
    return Fp32Choice(names[:count], score, reference_score, tuple(tried), within_budget=False)


def _check_score(what: str, score: float) -> None:
    if not math.isfinite(score):
        raise NumericalError(f"expected a finite score {what}, found {score}; check the calibration data")


def _counts(largest: int) -> Iterator[int]:
    """0, 1, 2, 4, … and ``largest``."""
    yield 0
    count = 1
    while count < largest:
        yield count
        count *= 2
    if largest:
        yield largest


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
    """weight: [out, in]; largest ratio over the scales."""
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
