"""One pass of the model over calibration data: second moments and means of what enters every output linear."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ziplm_deploy.errors import UsageError
from ziplm_deploy.models.modules import PrunableModule, output_linear
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.moments import InputMoments, Moments, moments_bytes
from ziplm_deploy.tasks.batching import Batch, rows_that_count


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    modules: Sequence[PrunableModule],
    *,
    memory_limit_bytes: int,
    progress: StepProgress | None = None,
) -> dict[str, InputMoments]:
    """Statistics of all modules at once, by name. They must fit into ``memory_limit_bytes`` together.

    Raises:
        UsageError: they do not fit; use :func:`iter_statistics` or a higher limit.
        DataError: no tokens.  NumericalError: NaN or infinite activations; names the module.
    """
    needed = statistics_bytes(modules)
    if needed > memory_limit_bytes:
        raise UsageError(
            f"expected statistics of {len(modules)} modules within prune.memory_limit_gb = "
            f"{memory_limit_bytes / 2**30:.2f}, found that they take {needed / 2**30:.2f} GiB; raise the limit"
        )
    return dict(iter_statistics(model, batches, modules, memory_limit_bytes=memory_limit_bytes, progress=progress))


def iter_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    modules: Sequence[PrunableModule],
    *,
    memory_limit_bytes: int,
    progress: StepProgress | None = None,
) -> Iterator[tuple[str, InputMoments]]:
    """Yield (module name, statistics), with as many modules in memory at once as the limit allows.

    Every group of modules takes a pass over the data. Tokens with ``attention_mask`` 0 are not counted; without a mask
    (images) all are. Modules that were dropped before have no inputs and are left out.

    Args:
        batches: model inputs; consumed once, kept in memory.
        memory_limit_bytes: for the moments of a group, see :func:`statistics_bytes`.
        progress: called with (batches done, batches in all groups).

    Raises:
        UsageError: one module alone is above the limit.
        DataError: no tokens.  NumericalError: NaN or infinite activations; names the module.
    """
    batches = list(batches)
    groups = module_groups([module for module in modules if module.structures], memory_limit_bytes)
    done = itertools.count(1)

    def batch_done() -> None:
        if progress is not None:
            progress(next(done), len(groups) * len(batches))

    for group in groups:
        moments = {module.name: _Moments(module) for module in group}
        _run(model, batches, moments, batch_done)
        for name in list(moments):
            yield name, moments.pop(name).finish()


def statistics_bytes(modules: Sequence[PrunableModule]) -> int:
    """Peak bytes of collecting these modules in one pass."""
    return moments_bytes([module.structures * module.group_size for module in modules])


def module_groups(modules: Sequence[PrunableModule], memory_limit_bytes: int) -> list[list[PrunableModule]]:
    """Split modules, in order, into groups that each fit; raises ``UsageError`` if a single module does not."""
    groups: list[list[PrunableModule]] = []
    for module in modules:
        if statistics_bytes([module]) > memory_limit_bytes:
            raise UsageError(
                f"expected the statistics of {module.name} within prune.memory_limit_gb = "
                f"{memory_limit_bytes / 2**30:.2f}, found that they take {statistics_bytes([module]) / 2**30:.2f} GiB; "
                "raise the limit"
            )
        if groups and statistics_bytes([*groups[-1], module]) <= memory_limit_bytes:
            groups[-1].append(module)
        else:
            groups.append([module])
    return groups


class _Moments(Moments):
    """Moments of what enters a module's output linear."""

    def __init__(self, module: PrunableModule) -> None:
        super().__init__(module.name, module.structures * module.group_size)
        self.module = module


@torch.inference_mode()
def _run(model: nn.Module, batches: list[Batch], moments: dict[str, _Moments], batch_done: Callable[[], None]) -> None:
    """Add what enters the modules' output linears to their moments."""
    mask: Tensor | None = None

    def hook_of(sums: _Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()  # [B, S, d]
            sums.add(rows_that_count(x, mask) if mask is not None else x.reshape(-1, x.shape[-1]))

        return hook

    handles: list[RemovableHandle] = []
    body: nn.Module = getattr(model, "base_model", model)  # nothing that is wanted lies in a head
    was_training = model.training
    model.eval()
    try:
        for sums in moments.values():
            handles.append(output_linear(model, sums.module).register_forward_pre_hook(hook_of(sums)))
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None  # [B, S]
            body(**batch)
            batch_done()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
