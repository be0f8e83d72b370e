"""Training examples, and batches of them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tests.helpers.models import labelled_rows, tiny_tokenizer
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.tasks import Task


def made_examples(folder: Path, task: Task, n: int = 48) -> Examples:
    processor = tiny_tokenizer(folder)
    return Examples(task.examples(labelled_rows(task.name, n), processor, 32), task, processor)


def batch_of(examples: Examples, positions: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    batch = examples.collate([examples[index] for index in positions])
    return batch, batch.pop("position")
