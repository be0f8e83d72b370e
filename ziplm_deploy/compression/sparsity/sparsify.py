"""Zeros in the linears of a whole encoder, dense or resized: which linears, how sparse each, and their new weights.

Linears are taken in the order in which the model runs them. What they get as input is collected from the model as it
then is, so each is fitted to the sparse linears before it. Only the moments of one input are in memory at a time, and
one layer is run at a time on hidden states that are kept for all calibration tokens.

Linears with a bias are fitted on centred inputs, which is best for weights and bias together: the bias becomes
``b + (W − Ŵ) μ`` (ALGORITHM, OBS). Every pass fits to the weights that the model had before the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ziplm_deploy.compression.sparsity import sparsegpt
from ziplm_deploy.compression.sparsity.densities import allocate_densities
from ziplm_deploy.compression.sparsity.record import LinearSparsity, SparsityRecord
from ziplm_deploy.errors import NumericalError, UnsupportedModelError, UsageError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.modules import layer_linears, layers_of
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.kernels.obs import damp
from ziplm_deploy.pruning.layer_calls import LayerCall, capture_calls, that_fit
from ziplm_deploy.pruning.moments import InputMoments, Moments, moments_bytes
from ziplm_deploy.recipe import SparsityConfig
from ziplm_deploy.tasks.batching import Batch


@dataclass(frozen=True)
class _Input:
    """Linears of one layer that get the same input: query, key and value; or one alone."""

    layer: int
    linears: dict[str, nn.Linear]

    @property
    def name(self) -> str:
        return next(iter(self.linears))

    @property
    def width(self) -> int:
        return next(iter(self.linears.values())).in_features


@dataclass(frozen=True)
class _Goal:
    """A linear, and what it was before anything was zeroed."""

    name: str
    linear: nn.Linear
    weight: Tensor  # [r, d]
    bias: Tensor | None  # [r]

    @classmethod
    def of(cls, name: str, linear: nn.Linear) -> _Goal:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(name, linear, linear.weight.detach().clone(), bias)

    def restore(self) -> None:
        with torch.no_grad():
            self.linear.weight.copy_(self.weight)
            if self.bias is not None:
                self.linear.bias.copy_(self.bias)


@dataclass(frozen=True)
class _Fit:
    relative_error: float
    damping: float
    n_tokens: int


def sparsify_model(
    model: nn.Module,
    batches: Iterable[Batch],
    config: SparsityConfig,
    *,
    memory_limit_bytes: int,
    progress: StepProgress | None = None,
    divergence: Callable[[nn.Module, Sequence[str]], float] | None = None,
) -> SparsityRecord:
    """Zero weights of ``model`` in place and fit what is left. Weights that are zero already stay so, and count.

    With several passes the density falls by the same factor in each. With ``distribution: sensitivity`` every linear
    is first made sparse alone, by the same method, and ``divergence`` of that model decides its density, see
    :func:`allocate_densities`.

    Args:
        batches: calibration inputs; consumed once, kept in memory with the hidden states of all their tokens.
        memory_limit_bytes: for the moments of one input and the work on its linears, see :func:`sparsity_bytes`.
        progress: called with (inputs done, inputs in all passes).
        divergence: distance of a model's answers from the dense model's, given what was changed in it; only needed for
            ``sensitivity``.

    Raises:
        UnsupportedModelError: no linears are left.  UsageError: one linear alone is above the memory limit.
        DataError: no calibration token reaches a linear; names it.
        NumericalError: NaN or infinite activations or weights; names the linear.
    """
    inputs = _inputs(model)
    _check_memory(inputs, memory_limit_bytes)
    if config.distribution == "sensitivity" and divergence is None:
        raise ValueError("expected `divergence` for distribution 'sensitivity', found none; pass the model's")
    batches, was_training = list(batches), model.training
    goals = {name: _Goal.of(name, linear) for part in inputs for name, linear in part.linears.items()}
    work = _Work(model, batches, inputs, goals, config, progress)
    model.eval()
    try:
        sensitivities = work.measure(divergence) if config.distribution == "sensitivity" and divergence else {}
        sizes = {name: goal.weight.numel() for name, goal in goals.items()}
        densities = dict.fromkeys(goals, 1 - config.sparsity)
        if sensitivities:
            present = {name: float((goal.weight != 0).double().mean()) for name, goal in goals.items()}
            densities = allocate_densities(sensitivities, sizes, 1 - config.sparsity, present)
        for index in range(config.passes):
            fits = work.run({name: density ** ((index + 1) / config.passes) for name, density in densities.items()})
    finally:
        model.train(was_training)
    return _record(config, inputs, fits, sensitivities)


def sparsity_bytes(width: int, outputs: int) -> int:
    """Peak bytes for one input of ``width``: its moments, and the matrices of the fit of a linear, in float64."""
    return moments_bytes([width]) + 8 * (5 * width**2 + 9 * width * outputs)


class _Work:
    """What all passes over one model share."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        inputs: list[_Input],
        goals: dict[str, _Goal],
        config: SparsityConfig,
        progress: StepProgress | None,
    ) -> None:
        self._model, self._batches, self._inputs, self._goals = model, batches, inputs, goals
        self._config, self._progress = config, progress
        self._done = 0
        self._total = len(inputs) * (config.passes + (config.distribution == "sensitivity"))

    def run(self, densities: dict[str, float]) -> dict[str, _Fit]:
        """One pass: every linear to its density, for good."""
        fits: dict[str, _Fit] = {}

        def visit(part: _Input, stats: InputMoments) -> None:
            for name in part.linears:
                fits[name] = _fit(self._goals[name], stats, densities[name], self._config)

        self._walk(visit)
        return fits

    def measure(self, divergence: Callable[[nn.Module, Sequence[str]], float]) -> dict[str, float]:
        """Divergence of the model with each linear alone at the sparsity; afterwards the model is as before."""
        found: dict[str, float] = {}

        def visit(part: _Input, stats: InputMoments) -> None:
            for name in part.linears:
                _fit(self._goals[name], stats, 1 - self._config.sparsity, self._config)
                found[name] = float(divergence(self._model, [name]))
                self._goals[name].restore()
                if not math.isfinite(found[name]):
                    raise NumericalError(
                        f"expected a finite divergence with {name} sparse, found {found[name]}; "
                        "check the checkpoint and the data"
                    )

        self._walk(visit)
        return found

    def _walk(self, visit: Callable[[_Input, InputMoments], None]) -> None:
        """Call ``visit`` with the moments of each input in turn; what it does to the linears shows in the next ones."""
        with torch.inference_mode():
            calls, hidden = capture_calls(self._model, that_fit(self._batches, self._model))
        for index, layer in enumerate(layers_of(self._model)):
            for part in (part for part in self._inputs if part.layer == index):
                visit(part, _moments(layer, part, calls, hidden))
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)
            with torch.inference_mode():
                hidden = [call.run(layer, states) for call, states in zip(calls, hidden, strict=True)]


def _inputs(model: nn.Module) -> list[_Input]:
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    together = {
        f"{architecture.attention}.{leaf}" for leaf in (architecture.query, architecture.key, architecture.value)
    }
    names = {linear: name for name, linear in layer_linears(model).items()}
    inputs: list[_Input] = []
    for index, layer in enumerate(layers_of(model)):
        linears = {path: module for path, module in layer.named_modules() if module in names}
        shared = {names[linear]: linear for path, linear in linears.items() if path in together}
        alone = [{names[linear]: linear} for path, linear in linears.items() if path not in together]
        inputs += [_Input(index, group) for group in (shared, *alone) if group]
    if not inputs:
        raise UnsupportedModelError(
            "expected linears in the layers to make sparse, found none: every module was dropped; leave sparsity out"
        )
    return inputs


def _check_memory(inputs: list[_Input], limit_bytes: int) -> None:
    for part in inputs:
        needed = max(sparsity_bytes(part.width, linear.out_features) for linear in part.linears.values())
        if needed > limit_bytes:
            raise UsageError(
                f"expected the work on {part.name} within prune.memory_limit_gb = {limit_bytes / 2**30:.2f}, "
                f"found that it takes {needed / 2**30:.2f} GiB; raise the limit"
            )


@torch.inference_mode()
def _moments(layer: nn.Module, part: _Input, calls: list[LayerCall], hidden: list[Tensor]) -> InputMoments:
    """Moments of what enters the linears of ``part`` at tokens that count, from a run of the layer."""
    moments = Moments(part.name, part.width)
    inputs: list[Tensor] = []
    linear = next(iter(part.linears.values()))
    handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        for call, states in zip(calls, hidden, strict=True):
            call.run(layer, states)
            while inputs:
                moments.add(call.tokens(inputs.pop()))
    finally:
        handle.remove()
    return moments.finish()


@torch.no_grad()
def _fit(goal: _Goal, stats: InputMoments, density: float, config: SparsityConfig) -> _Fit:
    """Zeros and new weights of one linear, in place."""
    linear = goal.linear
    centred = goal.bias is not None
    H = stats.moment(centred)  # [d, d]
    dense = goal.weight.double()  # [r, d]
    weight, damping = dense, 0.0
    sparsity = 1 - density
    if round(sparsity * dense.numel()) > 0:
        try:
            damped, damping, _ = damp(H, config.damping)
            # What enters there never varies: zeros cost nothing, and what is not zeroed stays as it is.
            dead = H.diagonal() == 0
            result = sparsegpt.sparsify(
                linear.weight.double().masked_fill(dead, 0),
                damped,
                sparsity,
                pattern=config.pattern,
                zeros=linear.weight == 0,
                target=dense.masked_fill(dead, 0),
            )
            weight = result.weight + dense.masked_fill(result.zeros | ~dead, 0)
        except NumericalError as error:
            raise NumericalError(f"{goal.name}: {error}") from error
    change = dense - weight
    outputs = float((dense @ H).mul_(dense).sum())  # E‖W(x−μ)‖², or E‖Wx‖² without a bias
    linear.weight.copy_(weight)
    if goal.bias is not None:
        linear.bias.copy_(goal.bias + change @ stats.mean)
        outputs += float((dense @ stats.mean + goal.bias).square().sum())
    return _Fit(float((change @ H).mul_(change).sum()) / outputs if outputs else 0.0, damping, stats.n_tokens)


def _record(
    config: SparsityConfig, inputs: list[_Input], fits: dict[str, _Fit], sensitivities: dict[str, float]
) -> SparsityRecord:
    linears = {name: linear for part in inputs for name, linear in part.linears.items()}
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears.values())
    return SparsityRecord(
        sparsity=zeros / sum(linear.weight.numel() for linear in linears.values()),
        pattern=config.pattern,
        distribution=config.distribution,
        passes=config.passes,
        relative_damping=config.damping,
        n_tokens=next(iter(fits.values())).n_tokens,
        linears=[
            LinearSparsity(
                name=name,
                shape=(linear.out_features, linear.in_features),
                density=float((linear.weight != 0).double().mean()),
                relative_error=fits[name].relative_error,
                damping=fits[name].damping,
                sensitivity=sensitivities.get(name),
            )
            for name, linear in linears.items()
        ],
    )
