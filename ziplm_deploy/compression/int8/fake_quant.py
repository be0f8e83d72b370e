"""Linears that compute in float32 what INT8 computes: to see how sensitive each is, and to train with the rounding.

======  ==================  =================================================================================
symbol  shape               meaning
======  ==================  =================================================================================
x       any                 an activation or a weight
s       [] / [1] / [out,1]  scale: one for a tensor, or one for each output of a weight
v       as x                x / s; integers are round(v) within n … p
n, p    scalars             −z … 255 − z for activations of zero point z; −127 … 127 or −64 … 64 for weights
======  ==================  =================================================================================

Forward: x̂ = s · clip(round(v), n, p). Backward as in LSQ (Esser et al. 2020, equations 3 and 4): the gradient of x
passes where v is inside; ∂x̂/∂s is round(v) − v inside, n below and p above, times 1/√(size · max(p, −n)). What is
trained is log(s / s₀): AdamW's steps ignore the size of a gradient, so steps of s itself would be percents of a small
scale (Jain et al. 2020). Zero points stay those of calibration; with s the whole range grows or shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ziplm_deploy.compression.int8.scales import (
    ACTIVATION_LEVELS,
    ActivationRange,
    LinearScales,
    activation_parameters,
    weight_scales,
)
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.errors import DataError, NumericalError, UsageError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import layer_linears, layers_of
from ziplm_deploy.tasks.batching import rows_that_count


class _Round(torch.autograd.Function):
    """Rounding to x̂ of the module docstring, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, n: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x, s, n, p)
        return (x / s).round().clamp(n, p) * s

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, s, n, p = ctx.saved_tensors
        v = x / s
        inside = (v >= n) & (v <= p)
        slope = torch.where(inside, v.round() - v, v.clamp(n, p))  # ∂x̂/∂s
        size = x.numel() / s.numel()
        gradient_s = (gradient * slope).sum_to_size(s.shape) / (size * torch.maximum(p, -n)).sqrt()
        return gradient * inside, gradient_s, None, None


def _fake_quantize(x: Tensor, s: Tensor, n: Tensor, p: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(x.float(), s, n, p)  # type: ignore[no-untyped-call]
    return rounded.to(x.dtype)


class ActivationQuantizer(nn.Module):
    """uint8 of one scale and zero point. Linears that read the same tensor share one, as their integers do."""

    initial_scale: Tensor  # float32 []
    zero_point: Tensor  # float32 []

    def __init__(self, values: ActivationRange) -> None:
        super().__init__()
        scale, zero_point = activation_parameters(values.low, values.high)
        self.register_buffer("initial_scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(float(zero_point)))
        self.log_ratio = nn.Parameter(torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """Scale of the activation, float32 []; positive."""
        return self.initial_scale * self.log_ratio.exp()

    def forward(self, x: Tensor) -> Tensor:
        return _fake_quantize(x, self.scale, -self.zero_point, ACTIVATION_LEVELS - self.zero_point)


class QuantizedLinear(nn.Linear):
    """A linear that rounds its input and its weight as INT8 does; holds the same parameters as the one it replaces.

    It is an ``nn.Linear``, so that masks and paths of weights hold. A zero weight stays zero.
    """

    initial_weight_scale: Tensor  # float32 [1, 1] or [out, 1]

    def __init__(self, linear: nn.Linear, activation: ActivationQuantizer, *, per_channel: bool, limit: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = activation
        self.limit = limit
        weight = linear.weight.detach().float().cpu().numpy()
        scales = weight_scales(weight, per_channel=per_channel, limit=limit)
        initial = torch.from_numpy(scales).to(linear.weight.device).unsqueeze(1)  # [1 or out, 1]
        self.register_buffer("initial_weight_scale", initial)
        self.weight_log_ratio = nn.Parameter(torch.zeros_like(initial))
        self.training = linear.training

    @property
    def weight_scale(self) -> Tensor:
        """Scale of the weight, float32 [1, 1] or [out, 1]; positive."""
        return self.initial_weight_scale * self.weight_log_ratio.exp()

    def forward(self, input: Tensor) -> Tensor:
        limit = self.weight_log_ratio.new_tensor(float(self.limit))
        weight = _fake_quantize(self.weight, self.weight_scale, -limit, limit)  # [out, in]
        return nn.functional.linear(self.activation(input), weight, self.bias)


def quantizable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linears inside the layers, and the head of a causal model, by module path: those that ``int8.quantize`` takes."""
    linears = layer_linears(model)
    if architecture_of(model.config).causal is not None:  # type: ignore[arg-type]
        head = model.get_output_embeddings()  # type: ignore[operator]
        linears |= {name: module for name, module in model.named_modules() if module is head}
    return linears


def module_ranges(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], linears: Collection[str] | None = None
) -> dict[str, ActivationRange]:
    """Smallest and largest input of linears over the tokens of the batches, padding left out (:func:`watch_inputs`).

    Args:
        batches: model inputs.
        linears: module paths; by default all of :func:`quantizable_linears`.

    Raises:
        UsageError: an unknown name.  DataError: no token reached a linear.
        NumericalError: NaN or infinite inputs; both name the linear.
    """
    chosen = _named(model, linears)
    ranges: dict[str, ActivationRange] = {}

    def look(name: str, x: Tensor) -> None:
        low, high = (float(value) for value in x.aminmax())
        if not np.isfinite(high - low):
            raise NumericalError(
                f"expected finite inputs of {name}, found NaN or infinity; check the checkpoint and the data"
            )
        seen = ranges.get(name, ActivationRange(low, high))
        ranges[name] = ActivationRange(min(low, seen.low), max(high, seen.high))

    watch_inputs(model, batches, chosen, look)
    missing = [name for name in chosen if name not in ranges]
    if missing:
        raise DataError(f"expected calibration data that reaches {missing[0]}, found none; give more examples")
    return ranges


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    linears: Mapping[str, nn.Linear],
    look: Callable[[str, Tensor], None],
) -> None:
    """Run the batches in evaluation mode and call ``look(name, input)`` for every linear that they reach.

    The input is [tokens, features] without the positions whose ``attention_mask`` is 0, on which no answer depends; all
    of [batch, length, features] where there is no mask, as for images.
    """
    mask: Tensor | None = None

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if mask is None else rows_that_count(args[0], mask)
            if x.numel():
                look(name, x)

        return hook

    training = [module for module in model.modules() if module.training]
    model.eval()
    handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None  # [batch, length]
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def insert_fake_quant(
    model: nn.Module,
    ranges: Mapping[str, ActivationRange],
    settings: Int8Settings,
    *,
    keep_fp32: Collection[str] = (),
) -> dict[str, QuantizedLinear]:
    """Put quantized linears in place of the plain ones; returns them by module path.

    :func:`remove_fake_quant` undoes it. Query, key and value of a layer share their activation's scale, and so do an
    FFN and its gate. Weights and biases stay the same parameters.

    Raises:
        UsageError: the model has quantized linears already, or a linear has no range.
    """
    linears = quantizable_linears(model)
    _named(model, keep_fp32)
    if any(isinstance(linear, QuantizedLinear) for linear in linears.values()):
        raise UsageError("expected a model with plain linears, found quantized ones; call remove_fake_quant first")
    chosen = [name for name in linears if name not in set(keep_fp32)]
    missing = [name for name in chosen if name not in ranges]
    if missing:
        raise UsageError(f"expected a range for {missing[0]}, found none; name it in keep_fp32 or measure it")
    quantizers = _quantizers(model, {name: ranges[name] for name in chosen})
    inserted = {}
    for name in chosen:
        linear = linears[name]
        activation = quantizers[name].to(linear.weight.device)
        inserted[name] = QuantizedLinear(
            linear, activation, per_channel=settings.config.per_channel, limit=settings.weight_limit
        )
        _replace(model, name, inserted[name])
    return inserted


def remove_fake_quant(model: nn.Module) -> None:
    """Put plain linears with the same (trained) parameters back."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, QuantizedLinear):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
            plain.weight, plain.bias, plain.training = linear.weight, linear.bias, linear.training
            _replace(model, name, plain)


def learned_ranges(model: nn.Module) -> dict[str, LinearScales]:
    """Scales of the quantized linears, for ``int8.quantize(..., ranges=...)``: the file then rounds as training did.

    Raises:
        UsageError: the model has no quantized linears.  NumericalError: a scale is not finite; names the linear.
    """
    learned = {}
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear):
            weight_scale = tuple(linear.weight_scale.detach().flatten().tolist())
            scale = float(linear.activation.scale.detach())
            if not np.isfinite([scale, *weight_scale]).all():
                raise NumericalError(f"expected finite scales of {name}, found others; lower the learning rate")
            learned[name] = LinearScales(scale, int(linear.activation.zero_point), weight_scale, linear.limit)
    if not learned:
        raise UsageError("expected a model with quantized linears, found none; call insert_fake_quant first")
    return learned


def _named(model: nn.Module, names: Collection[str] | None) -> dict[str, nn.Linear]:
    linears = quantizable_linears(model)
    unknown = sorted(set(names or ()) - linears.keys())
    if unknown:
        raise UsageError(
            f"expected names of linears such as {next(iter(linears), '(none)')}, found {unknown[0]!r}; correct it"
        )
    return linears if names is None else {name: linears[name] for name in linears if name in set(names)}


def _quantizers(model: nn.Module, ranges: Mapping[str, ActivationRange]) -> dict[str, ActivationQuantizer]:
    """A quantizer for each linear; one for those of q, k and v that a layer quantizes, one for an FFN and its gate."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    layers = layers_of(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, ActivationQuantizer] = {}
    for index in range(len(layers)):
        for block, parts in (
            (architecture.attention, (architecture.query, architecture.key, architecture.value)),
            (architecture.ffn, (architecture.ffn_input, architecture.ffn_gate)),
        ):
            paths = [".".join(filter(None, (prefix, str(index), block, part))) for part in parts if part is not None]
            shared = [name for name in paths if name in ranges]
            if shared:
                low, high = min(ranges[name].low for name in shared), max(ranges[name].high for name in shared)
                found.update(dict.fromkeys(shared, ActivationQuantizer(ActivationRange(low, high))))
    for name, values in ranges.items():
        if name not in found:
            found[name] = ActivationQuantizer(values)
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
