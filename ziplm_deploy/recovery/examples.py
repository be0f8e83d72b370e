"""Training examples, and the order in which an epoch goes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch

POSITION = "position"  # batch key: number of the example, by which the teacher knows it


class Examples(Dataset[Batch]):
    """Encoded training examples, each with its position."""

    def __init__(self, examples: Sequence[Batch], task: Task, processor: Any) -> None:
        self._examples, self._task, self._processor = list(examples), task, processor
        self.lengths = [example["input_ids"].shape[1] if "input_ids" in example else 1 for example in examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Batch:
        return {**self._examples[index], POSITION: torch.tensor([index])}

    @property
    def n_tokens(self) -> int:
        """Tokens of all examples without padding; 0 for images, whose tokens only the model counts."""
        return sum(self.lengths) if self._examples and "input_ids" in self._examples[0] else 0

    def collate(self, items: list[Batch]) -> Batch:
        """One batch of examples, with their positions ``[batch]``."""
        positions = torch.cat([item[POSITION] for item in items])
        inputs = [{name: value for name, value in item.items() if name != POSITION} for item in items]
        return {**self._task.collate(inputs, self._processor), POSITION: positions}


class LengthGrouped(Sampler[int]):
    """Random order with neighbours of about equal length; depends on seed and epoch alone, so it can be resumed."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = get_length_grouped_indices(  # type: ignore[no-untyped-call]
            self._lengths, self._batch_size, generator=generator
        )
        return iter([int(index) for index in order])
