"""The lengths of a workload from a file of texts: as many tokens as the model's own tokenizer makes of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ziplm_deploy.errors import DataError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.dense import load_config, load_processor
from ziplm_deploy.models.processors import positions_of
from ziplm_deploy.progress import Note
from ziplm_deploy.recipe import DataConfig, Recipe, Workload
from ziplm_deploy.recipe.lengths import MAX_TOKENS, of_lengths
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import length_limit, token_lengths
from ziplm_deploy.tasks.data import Row, cell, find_columns, read_rows

TEXT_COLUMNS = (("text",), ("sentence",))


def with_counted_lengths(recipe: Recipe, task: Task, note: Note) -> Recipe:
    """A recipe with counted lengths in place of the file of texts that its workload names; without one, as it is.

    A text counts as what the model gets of it: with the prompt, and no more tokens than its tokenizer cuts at, or than
    the model has positions for.
    ``note`` is told how many were cut.

    Raises:
        DataError: the file has no texts, or no column with them.  UnsupportedModelError: the tokenizer cannot be read.
    """
    workload = recipe.environment.workload
    if not isinstance(workload.lengths, Path):
        return recipe
    processor = load_processor(recipe.model)
    texts = _texts(read_rows(str(workload.lengths), split="train"), recipe, task)
    limit = length_limit(processor, MAX_TOKENS)
    config = load_config(recipe.model)
    if limit == MAX_TOKENS or architecture_of(config).causal is not None:
        # A tokenizer that knows no limit. Those of other encoders may count positions in their own way.
        limit = min(limit, positions_of(config, task.auto_class))
    lengths = _lengths(texts, task, processor)
    cut = sum(length > limit for length in lengths)
    if cut:
        note(
            f"{cut:,} of {len(lengths):,} texts in {workload.lengths} are cut to {limit} tokens, and count as that long"
        )
    counted = Workload(batch_size=workload.batch_size, lengths=of_lengths(min(length, limit) for length in lengths))
    note(f"texts in {workload.lengths}: {counted.describe()}")
    environment = recipe.environment.model_copy(update={"workload": counted})
    return recipe.model_copy(update={"environment": environment})


def _lengths(texts: list[dict[str, Any]], task: Task, processor: Any) -> list[int]:
    """Tokens of every request; of a pair for a reranker, in the prompt that it is read in."""
    if task.name != "reranking":
        return token_lengths(processor, texts)
    if any("text_pair" not in row for row in texts):
        raise DataError(
            "expected pairs of query and passage in the file of environment.workload.lengths for reranking, whose "
            "models score a pair, found single texts; name both columns in data.text_columns, or give numbers of tokens"
        )
    return task.token_lengths(texts, processor)


def _texts(rows: list[Row], recipe: Recipe, task: Task) -> list[dict[str, Any]]:
    """Requests in the rows of a file, with ``text`` and perhaps ``text_pair``; blank ones are none."""
    columns = _columns(rows, recipe.data, task)
    parts = [[_text(row, name, number) for name in columns] for number, row in enumerate(rows, 1)]
    if task.name == "sentence-similarity":  # both texts of a pair are requests of their own
        texts = [{"text": (recipe.model.prompt or "") + text} for texts in parts for text in texts if text.strip()]
    else:
        texts = [dict(zip(("text", "text_pair"), row, strict=False)) for row in parts if any(map(str.strip, row))]
    if not texts:
        raise DataError(
            f"expected texts in {recipe.environment.workload.lengths}, found only blank ones; give a file of requests"
        )
    return texts


def _columns(rows: list[Row], data: DataConfig, task: Task) -> tuple[str, ...]:
    """Columns that the recipe names for its data, if this file has them too, else the usual ones; two at most."""
    asked = data.text_columns if data.text_columns and set(data.text_columns) <= set(rows[0]) else None
    columns = find_columns(rows, asked, (*task.text_columns, *TEXT_COLUMNS), what="text", field="text_columns")
    return columns[:2]


def _text(row: Row, column: str, number: int) -> str:
    value = cell(row, column, (str, list), number, "text")
    return value if isinstance(value, str) else " ".join(map(str, value))
