"""Refit the kept weights of a pruned model to the dense model's residual stream, layer by layer, in closed form.

OBS weights are best for the *dense* model's inputs. In a pruned model every module sees inputs that already drifted.
Going from the first layer to the last, each output linear is therefore solved again by ridge regression towards its
OBS weights:

    min over Δ, b:   Σ ‖ (Ŵ + Δ) x̃ + b + r̃ − (r + W x + b₀) ‖²  +  λ ‖Δ‖²

with x̃, r̃ the inputs and residual of the pruned model and the right-hand sum that of the dense model: the module
corrects the drift of everything before it too. Where attention and FFN are added to one residual together (GPT-NeoX),
attention counts to the residual of the FFN, or both would take away the whole drift. λ is chosen on held-out examples;
"no change" is among the choices, so a calibration set that is too small leaves the weights as they are. A module that
cannot be solved stays, too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ziplm_deploy.errors import NumericalError
from ziplm_deploy.models.modules import PrunableModule, is_parallel, layers_of, output_module, prunable_modules
from ziplm_deploy.models.shape import ModuleKind
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.layer_calls import AllRecorded, LayerCall, ModuleTap, capture_calls
from ziplm_deploy.tasks.batching import Batch

RIDGES = (0.003, 0.03, 0.3, 3.0)  # relative to the mean diagonal of the inputs' covariance

# Makes a module of the pruned model smaller, given the calls of its layer and the hidden states that it gets there.
Shrink = Callable[[PrunableModule, list[LayerCall], list[Tensor]], None]


class _Moments:
    """Second moments of inputs x̃ and errors y, float64, about reference points: ``centre_x`` [d], ``centre_y`` [r].

    Sums are of float32 products of what is left beside the reference: rounding then stays relative to the spread of a
    column, not to its mean, which may be a hundred times as large. Sums that are added up need one reference.
    """

    def __init__(self, centre_x: Tensor, centre_y: Tensor) -> None:
        self.centre_x, self.centre_y = centre_x, centre_y  # float32
        d, r = len(centre_x), len(centre_y)
        self.xx = torch.zeros(d, d, dtype=torch.float64)  # Σ (x−cx)(x−cx)ᵀ
        self.yx = torch.zeros(r, d, dtype=torch.float64)
        self.x = torch.zeros(d, dtype=torch.float64)
        self.y = torch.zeros(r, dtype=torch.float64)
        self.yy, self.n = 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count N more tokens: x [N, d], y [N, r]."""
        x, y = x - self.centre_x, y - self.centre_y
        self.xx += (x.T @ x).double()  # [d, d]
        self.yx += (y.T @ x).double()  # [r, d]
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.yy += float((y.double() ** 2).sum())
        self.n += len(x)

    def __add__(self, other: _Moments) -> _Moments:
        total = _Moments(self.centre_x, self.centre_y)
        for name in ("xx", "yx", "x", "y", "yy", "n"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def covariance(self) -> Tensor:
        """Covariance of the inputs, [d, d]."""
        mean = self.x / self.n
        return self.xx / self.n - torch.outer(mean, mean)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor] | None:
        """Δ [r, d] and the bias shift [r] that take y away, or None if the covariance is not positive definite.

        The ridge is relative to the mean diagonal; without inputs (d = 0) only the bias shifts.
        """
        mean_x, mean_y = self.x / self.n, self.y / self.n  # beside the reference
        whole_x, whole_y = mean_x + self.centre_x, mean_y + self.centre_y
        if not len(mean_x):
            return torch.zeros_like(self.yx), whole_y
        covariance = self.covariance()
        cross = self.yx / self.n - torch.outer(mean_y, mean_x)  # [r, d]
        damping = ridge * float(covariance.diagonal().mean()) + 1e-12
        covariance.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            return None
        delta = torch.cholesky_solve(cross.T, factor).T  # [r, d]
        return delta, whole_y - delta @ whole_x

    def error(self, delta: Tensor, shift: Tensor) -> float:
        """Σ ‖y − Δ x − shift‖² on these moments."""
        rest = shift - self.centre_y + delta @ self.centre_x.double()  # the shift that is left beside the reference
        value = self.yy + float((delta @ self.xx * delta).sum()) + self.n * float(rest @ rest)
        value += -2 * float((delta * self.yx).sum()) - 2 * float(rest @ self.y) + 2 * float(rest @ (delta @ self.x))
        return value


def reconstruct(
    dense: nn.Module, pruned: nn.Module, batches: Sequence[Batch], progress: StepProgress | None = None
) -> list[str]:
    """Refit every output linear (and every dropped module's bias) of ``pruned`` in place.

    Args:
        dense: the model that was pruned, which may have been resized before; not changed.
        pruned: a resized copy of it, changed in place.
        batches: calibration inputs; every fifth example is held out to choose the ridge, then used as well.
        progress: called with (modules done, modules in all).

    Returns:
        Names of modules that stay as they were because no ridge made their covariance positive definite.

    Raises:
        NumericalError: activations are not finite.
    """
    return walk(dense, pruned, batches, progress=progress)


@torch.no_grad()
def walk(
    dense: nn.Module,
    pruned: nn.Module,
    batches: Sequence[Batch],
    *,
    shrink: Shrink | None = None,
    refits: bool = True,
    progress: StepProgress | None = None,
) -> list[str]:
    """Go through the modules of ``pruned`` in order: shrink each, refit it; later ones see what became of it.

    Arguments, result and errors are those of :func:`reconstruct`. ``shrink`` changes the module that it is given in
    place, or leaves it; ``refits``: whether kept weights are refitted then.
    """
    modules, unsolved = prunable_modules(dense), []
    calls, dense_hidden = capture_calls(dense, batches)
    hidden = list(dense_hidden)  # embeddings are not pruned
    for index, (dense_layer, layer) in enumerate(zip(layers_of(dense), layers_of(pruned), strict=True)):
        pair = [module for module in modules if module.layer == index]
        targets: dict[str, list[Tensor]] = {}
        if refits:
            targets, dense_hidden = _dense_sums(dense, dense_layer, pair, calls, dense_hidden)
        for module in pair:
            if shrink is not None:
                shrink(module, calls, hidden)
            if refits and not _refit(pruned, layer, module, calls, hidden, targets[module.kind]):
                unsolved.append(module.name)
            if progress is not None:
                progress(modules.index(module) + 1, len(modules))
        hidden = [call.run(layer, states) for call, states in zip(calls, hidden, strict=True)]
    return unsolved


def _dense_sums(
    dense: nn.Module, layer: nn.Module, pair: list[PrunableModule], calls: list[LayerCall], hidden: list[Tensor]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Residual plus module output of the dense model [N, r], per kind and batch; and the layer's outputs."""
    taps = {module.kind: ModuleTap(dense, module) for module in pair}
    sums: dict[str, list[Tensor]] = {module.kind: [] for module in pair}
    outputs = []
    try:
        for call, states in zip(calls, hidden, strict=True):
            outputs.append(call.run(layer, states))
            for kind, tap in taps.items():
                whole = outputs[-1] if _is_added_last(dense, kind) else tap.residual + tap.y
                sums[kind].append(call.tokens(whole))
    finally:
        for tap in taps.values():
            tap.close()
    return sums, outputs


def _is_added_last(model: nn.Module, kind: ModuleKind) -> bool:
    """Whether residual and output of a module are the layer's output, since attention was added with it."""
    return kind == "ffn" and is_parallel(model)


def _refit(
    pruned: nn.Module,
    layer: nn.Module,
    module: PrunableModule,
    calls: list[LayerCall],
    hidden: list[Tensor],
    targets: list[Tensor],
) -> bool:
    """Refit one module in place; False if it could not be solved and stays as it is."""
    linear = output_module(pruned, module)
    weight, bias = getattr(linear, "weight", None), linear.bias
    d = weight.shape[1] if isinstance(weight, Tensor) else 0
    sums: tuple[_Moments, _Moments] | None = None
    added_last = _is_added_last(pruned, module.kind)
    tap = ModuleTap(pruned, module, ends_call=not added_last)
    try:
        for call, states, target in zip(calls, hidden, targets, strict=True):
            whole: Tensor | None = None
            with contextlib.suppress(AllRecorded):
                whole = call.run(layer, states)
            output = call.tokens(tap.y.expand_as(tap.residual))  # [N, r]
            if not len(output):
                continue
            residual = call.tokens(tap.residual) if whole is None else call.tokens(whole) - output  # [N, r]
            x = call.tokens(tap.x) if d else residual[:, :0]  # [N, d]
            error = target - residual - output  # [N, r]
            fit, held_out = sums = sums or (_Moments(x.mean(0), error.mean(0)), _Moments(x.mean(0), error.mean(0)))
            fit.add(x[~call.held_out], error[~call.held_out])
            held_out.add(x[call.held_out], error[call.held_out])
    finally:
        tap.close()
    if sums is None:
        return True
    correction = _choose(*sums, module.name)
    if correction is None:
        return False
    delta, shift = correction
    if isinstance(weight, Tensor):
        weight.add_(delta.to(weight.dtype))
    if isinstance(bias, Tensor):
        bias.add_(shift.to(bias.dtype))
    elif bool(shift.any()):  # a linear that had none before
        assert isinstance(weight, Tensor)
        linear.bias = nn.Parameter(shift.to(weight.dtype))
    return True


def _choose(fit: _Moments, held_out: _Moments, name: str) -> tuple[Tensor, Tensor] | None:
    """The correction with the least held-out error, solved again on all tokens; zeros when none helps.

    None: none could be solved.
    """
    unchanged = torch.zeros_like(fit.yx), torch.zeros_like(fit.y)
    if not math.isfinite(fit.yy + held_out.yy):
        raise NumericalError(f"expected finite activations in {name}, found NaN or infinity; check the pruned model")
    if not held_out.n or not fit.n:
        return unchanged
    solved = {ridge: fit.solve(ridge) for ridge in (RIDGES if len(fit.x) else (0.0,))}
    errors = {ridge: held_out.error(*correction) for ridge, correction in solved.items() if correction is not None}
    if not errors:
        return None
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= held_out.error(*unchanged):
        return unchanged
    return (fit + held_out).solve(best)
