"""How far a changed model's answers are from those that it gave before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch


def divergence_from(task: Task, model: nn.Module, batches: Sequence[Batch]) -> Callable[[nn.Module], float]:
    """A function of a model: mean divergence over these batches from what ``model`` answers now, in eval mode."""

    @torch.inference_mode()
    def features(candidate: nn.Module, batch: Batch) -> Tensor:
        return task.compared(candidate, batch)

    wanted = [features(model, batch) for batch in batches]
    sizes = [len(next(iter(batch.values()))) for batch in batches]

    def divergence(candidate: nn.Module) -> float:
        parts = [
            size * float(task.divergence(features(candidate, batch), answer))
            for batch, answer, size in zip(batches, wanted, sizes, strict=True)
        ]
        return sum(parts) / sum(sizes)

    return divergence
