"""What the task's loss makes of a change in a module's output: the Fisher information at it, from one backward pass.

A module whose output changes by Δy on every token costs ``½ E[Δyᵀ F Δy]`` of divergence, to second order and with the
change independent of the gradient (K-FAC; Martens and Grosse, "Optimizing neural networks with Kronecker-factored
approximate curvature", 2015). OBS takes F for the identity: every direction of an output then counts alike, and errors
of different modules cannot be compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ziplm_deploy.errors import NumericalError, UsageError
from ziplm_deploy.models.modules import PrunableModule, layers_of, output_linear
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch

ENOUGH_TOKENS = 8192  # of calibration; F [r, r] of a hidden size r below a thousand hardly changes after that
TOKENS_AT_ONCE = 512  # kept for the way back, with the logits of each


def fisher_information(
    model: nn.Module,
    task: Task,
    batches: Sequence[Batch],
    modules: Sequence[PrunableModule],
    *,
    seed: int,
    memory_limit_bytes: int,
    progress: StepProgress | None = None,
) -> dict[str, Tensor]:
    """F of every module that is there, by name: float64 [hidden, hidden], in the unit of the task's divergence.

    Gradients are of losses against labels drawn from the model's own answers (:meth:`Task.sampled_loss`).

    Args:
        batches: model inputs; as many parts are read, evenly from all, as hold :data:`ENOUGH_TOKENS`. Windows of
            language models are cut at :data:`TOKENS_AT_ONCE`.
        memory_limit_bytes: for F of all modules, see :func:`fisher_bytes`.
        progress: called with (tokens done, tokens in all).

    Raises:
        UsageError: F of all modules is above the limit.
        NumericalError: NaN or infinite gradients; names the module.
    """
    modules = [module for module in modules if module.structures]
    needed = fisher_bytes([output_linear(model, module).out_features for module in modules])
    if needed > memory_limit_bytes:
        raise UsageError(
            f"expected Fisher information of {len(modules)} modules within prune.memory_limit_gb = "
            f"{memory_limit_bytes / 2**30:.2f}, found that it takes {needed / 2**30:.2f} GiB; raise the limit, or set "
            "prune.fisher: false"
        )
    parts = _parts(batches, TOKENS_AT_ONCE if task.is_causal else None)
    total = sum(_tokens(part) for part in parts)
    generator = torch.Generator().manual_seed(seed)
    sums = _Gradients(model, modules)
    done = n_rows = 0
    with sums:
        for part in parts:
            features = task.distilled(task.forward(model, part), part)
            task.sampled_loss(features, generator).backward()  # type: ignore[no-untyped-call]
            n_rows += features.shape[:-1].numel()
            done += _tokens(part)
            if progress is not None:
                progress(done, total)
    return sums.finish(n_rows)


def fisher_bytes(widths: Iterable[int]) -> int:
    """Bytes of F for outputs of these sizes: its sums in float64, and what a database keeps of it in float32."""
    return sum((8 + 4) * width * width for width in widths)


class _Gradients:
    """Running sums of g gᵀ at the output of every module, while this context is open.

    Of the way forward only what enters each layer is kept; the way back computes a layer again. So memory holds what
    one layer computes, not what all do.
    """

    def __init__(self, model: nn.Module, modules: Sequence[PrunableModule]) -> None:
        self.model = model
        self.linears = {module.name: output_linear(model, module) for module in modules}
        self.sums = {
            name: torch.zeros(linear.out_features, linear.out_features, dtype=torch.float64)
            for name, linear in self.linears.items()
        }

    def __enter__(self) -> _Gradients:
        self._was_training = self.model.training
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval()
        self.model.requires_grad_(False)
        self._handles = [linear.register_forward_hook(self._hook_of(name)) for name, linear in self.linears.items()]
        config: Any = self.model.config
        self._had_cache = getattr(config, "use_cache", None)
        if self._had_cache:  # a layer that is computed again would append to it again
            config.use_cache = False
        self._own = [(layer, vars(layer).get("forward")) for layer in layers_of(self.model)]
        for layer, _ in self._own:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        return self

    def __exit__(self, *_: object) -> None:
        for layer, own in self._own:
            del layer.forward
            if own is not None:
                layer.forward = own
        if self._had_cache:
            self.model.config.use_cache = True  # type: ignore[union-attr]
        for handle in self._handles:
            handle.remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self.model.train(self._was_training)

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()  # [tokens, hidden]
            self.sums[name] += g.T @ g

        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            output.requires_grad_(True)  # parameters ask for none: here the way back ends
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    def finish(self, n_rows: int) -> dict[str, Tensor]:
        """The sums over rows of features, whose mean the divergence is."""
        for name, total in self.sums.items():
            if not bool(torch.isfinite(total).all()):
                raise NumericalError(
                    f"expected finite gradients at the output of {name}, found NaN or infinity; check the checkpoint"
                )
            total /= max(n_rows, 1)
        return self.sums


def _parts(batches: Sequence[Batch], longest: int | None) -> list[Batch]:
    """Batches in parts of a few rows; evenly from all of them, which are sorted by length, until there are enough."""
    parts: list[Batch] = []
    for batch in batches:
        if longest is not None:
            batch = {name: value[:, :longest] for name, value in batch.items()}
        n_rows = len(next(iter(batch.values())))
        step = max(1, TOKENS_AT_ONCE * n_rows // max(_tokens(batch), 1))
        for first in range(0, n_rows, step):
            parts.append({name: value[first : first + step] for name, value in batch.items()})
    share = min(1.0, ENOUGH_TOKENS / max(sum(map(_tokens, parts)), 1))
    chosen = range(math.ceil(share * len(parts)))
    return [parts[int((number + 0.5) * len(parts) / len(chosen))] for number in chosen]


def _tokens(batch: Batch) -> int:
    """Tokens of a batch without padding; an image counts as one."""
    mask = batch.get("attention_mask")
    return len(next(iter(batch.values()))) if mask is None else int(mask.sum())
