"""What every task offers: rows, batches, metric, and the loss that guides the search.

Rows are normalised once when they are loaded, so nothing after :meth:`Task.load_rows` knows column names.
A *run* is anything that maps named numpy inputs to named numpy outputs: an ONNX session or :func:`torch_run`.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ziplm_deploy.config import DataConfig, ModelConfig, TaskName
from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.data import Row, find_columns, read_rows, sample_rows

Which = Literal["calibration", "evaluation"]
Batch = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]


class Task(ABC):
    """One task: its data, its metric and its model classes. Subclasses are stateless apart from the model's config."""

    name: ClassVar[TaskName]
    metric_name: ClassVar[str]  # primary key of evaluate()'s result; higher is better
    auto_class: ClassVar[str]  # class of transformers that loads the dense model
    ort_class: ClassVar[str]  # class of optimum that serves the ONNX file
    output_names: ClassVar[tuple[str, ...]]
    input_kind: ClassVar[Literal["text", "image"]] = "text"
    text_columns: ClassVar[tuple[tuple[str, ...], ...]]  # usual names, most specific first
    label_columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def load_rows(self, data: DataConfig, which: Which, seed: int) -> list[Row]:
        """Normalised rows of the calibration or evaluation set, sampled with ``seed``.

        Calibration rows come in random order, so that their first n are a fair sample; evaluation rows in their own.

        Raises:
            DataError: nothing configured, missing, empty, fewer rows than asked for, or columns are missing.
        """
        calibrating = which == "calibration"
        source = data.calibration if calibrating else data.evaluation
        if source is None:
            raise DataError(f"expected data.{which} in the recipe, found none; give a data file or a `datasets` name")
        split = data.calibration_split if calibrating else data.evaluation_split
        raw = read_rows(source, split=split, config_name=data.config_name)
        try:
            rows = self.normalise_rows(raw, data, which)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        count = data.n_calibration if calibrating else data.n_evaluation
        return sample_rows(rows, count, seed, field=f"n_{which}", shuffle=calibrating)

    @abstractmethod
    def normalise_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        """Bring raw rows to the keys that this task's other methods read; raises :class:`DataError`."""

    def columns(
        self, raw: list[Row], data: DataConfig, usual: Sequence[Sequence[str]] | None = None
    ) -> tuple[str, ...]:
        """Columns with the input, as asked for in the recipe or by their usual names."""
        what = "image" if self.input_kind == "image" else "text"
        usual = self.text_columns if usual is None else usual
        return find_columns(raw, data.text_columns, usual, what=what, field="text_columns")

    def find_label_column(self, raw: list[Row], data: DataConfig, which: Which) -> str | None:
        """Column with the label; None for calibration data without one, as calibration needs no labels."""
        if which == "calibration" and data.label_column is None and not set(self.label_columns) & set(raw[0]):
            return None
        asked = None if data.label_column is None else [data.label_column]
        usual = [[name] for name in self.label_columns]
        return find_columns(raw, asked, usual, what="label", field="label_column")[0]

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        """Rows whose labels are in the model's numbering; use these from here on. Tasks without classes: unchanged.

        Raises:
            DataError: a label is unknown to ``config.label2id`` or outside ``config.num_labels``.
        """
        return rows

    @abstractmethod
    def encode(
        self,
        rows: list[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        *,
        pad_to: int | None = None,
        sort: bool = True,
    ) -> list[Batch]:
        """Model inputs, one example a row: tensors [batch, length], padded per batch or to exactly ``pad_to``.

        ``sort`` orders the examples by length, so that batches carry little padding.
        """

    @abstractmethod
    def evaluate(
        self,
        run: Run,
        rows: list[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        pad_to: int | None = None,
    ) -> dict[str, float]:
        """Metrics on labelled rows, 1 is best. With ``pad_to`` every batch is exactly [batch_size, pad_to]."""

    def fidelity(
        self,
        run: Run,
        dense_run: Run,
        rows: list[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        pad_to: int | None = None,
    ) -> dict[str, float]:
        """How close the outputs stay to the dense model's, needing no labels; empty where the metric says enough."""
        return {}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named outputs of a torch model; inputs that it does not take are left out."""
        accepted = _parameters(type(model).forward)
        outputs = model(**{name: value for name, value in batch.items() if name in accepted})
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    @abstractmethod
    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """What :meth:`divergence` compares: rows of logits, or embeddings, without padding."""

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """Mean KL(dense ‖ candidate) over the last dimension of logits ``[…, classes]``; a scalar ≥ 0."""
        return kl_divergence(candidate, dense)


def kl_divergence(candidate: Tensor, dense: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(dense) ‖ softmax(candidate)); logits ``[…, classes]``, scalar out, in nats."""
    log_q = candidate.float().log_softmax(-1)
    log_p = dense.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def torch_run(task: Task, model: nn.Module) -> Run:
    """A torch model as a :data:`Run`, to evaluate it exactly as an ONNX file is evaluated."""

    def run(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            outputs = task.forward(model, {name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def class_logits(run: Run, batches: Iterator[tuple[list[int], Arrays]], n_rows: int) -> np.ndarray:
    """Logits ``[n_rows, classes]`` in row order from batches of (row indices, inputs)."""
    predicted: list[np.ndarray | None] = [None] * n_rows
    for indices, inputs in batches:
        logits = run(inputs)["logits"]
        for position, index in enumerate(indices):
            predicted[index] = logits[position]
    return np.stack([row for row in predicted if row is not None])


def map_label(value: Any, config: Any, number: int) -> int:
    """A label as the model's class number: by name through ``label2id``, or an integer in range.

    Raises:
        DataError: neither; names the row and the labels that the model knows.
    """
    names: dict[str, int] = dict(config.label2id or {})
    if isinstance(value, str):
        by_folded = {name.casefold(): index for name, index in names.items()}
        index = names.get(value, by_folded.get(value.strip().casefold()))
        if index is not None:
            return int(index)
        value = _as_number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, np.integer)) and 0 <= int(value) < config.num_labels:
        return int(value)
    known = ", ".join(sorted(names, key=lambda name: names[name])[:12])
    raise DataError(
        f"expected labels of the model's head, 0 to {config.num_labels - 1} or one of {known}, found {value!r} in row "
        f"{number}; use a model whose head fits the data, or rename the labels (-1 marks test splits without labels)"
    )


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
