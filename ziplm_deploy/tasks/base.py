"""Base class of the tasks: rows, batches, metric, the loss that guides the search, and the losses of training.

Rows are normalized once when they are loaded, so nothing after :meth:`Task.load_rows` knows column names.
The model is a :data:`~ziplm_deploy.tasks.evaluation_set.ModelFunction`: an ONNX file, or :func:`torch_function`.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.recipe import DataConfig, ModelConfig, TaskName
from ziplm_deploy.tasks.batching import Arrays, Batch, collate_examples, token_lengths
from ziplm_deploy.tasks.data import Row, find_columns, read_rows, sample_rows
from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.label_metrics import PREFIX, check_examples, f1_of_label, label_of
from ziplm_deploy.tasks.label_reading import LabelReading
from ziplm_deploy.tasks.losses import cross_entropy, kl_divergence, sampled_cross_entropy
from ziplm_deploy.tasks.metrics import Metric, score
from ziplm_deploy.tasks.outcomes import Outcomes

Which = Literal["calibration", "evaluation", "train"]


class Task(ABC):
    """One task: its data, its metric and its model classes. Subclasses are stateless apart from the model's config."""

    name: ClassVar[TaskName]
    metric_name: str  # the primary one of the metrics; higher is better
    metrics: Mapping[str, Metric]  # every score that evaluate() gives, by its key
    further_metrics: ClassVar[Mapping[str, Metric]] = MappingProxyType({})  # computed if model.metric asks for one
    unscaled_metrics: ClassVar[frozenset[str]] = frozenset()  # below 0, so that no share of them means anything
    auto_class: ClassVar[str]  # class of transformers that loads the dense model
    ort_class: str  # class of optimum that serves the ONNX file
    output_names: ClassVar[tuple[str, ...]]
    has_classes: ClassVar[bool] = False  # the head's outputs are classes with names
    reading_version: ClassVar[int] = 1  # a larger one repeats evaluations whose labels were read otherwise
    is_causal: ClassVar[bool] = False  # of language models that read from left to right
    takes_causal: ClassVar[bool] = False  # also of those without their head over the vocabulary, as encoders
    cuts_texts: ClassVar[bool] = True  # what is longer than a request loses its end
    input_kind: ClassVar[Literal["text", "image"]] = "text"
    text_columns: ClassVar[tuple[tuple[str, ...], ...]]  # usual names, most specific first
    label_columns: ClassVar[tuple[str, ...]] = ()
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # labels in a training batch; empty: no loss of its own
    feature_outputs: ClassVar[tuple[str, ...]] = ("logits",)  # what features() reads
    token_outputs: ClassVar[frozenset[str]] = frozenset()  # those of them with tokens as axis 1

    def __init__(self, model: ModelConfig) -> None:
        """Raises :class:`RecipeError` for a metric that the task has not."""
        self.model = model
        if model.metric is None:
            return
        known = {**self.metrics, **self.further_metrics}
        label = label_of(model.metric) if self.has_classes else None
        if label is not None:  # whether there is such a label, check_labels sees
            known[model.metric] = f1_of_label(label)
        choices = [name for name in known if name not in self.unscaled_metrics]
        if model.metric not in choices:
            of_label = [f"{PREFIX}LABEL"] if self.has_classes else []
            raise RecipeError(
                f"expected a metric of {self.name} ({', '.join([*choices, *of_label])}), found {model.metric!r}; "
                "correct model.metric"
            )
        self.metric_name = model.metric
        self.metrics = {model.metric: known[model.metric], **self.metrics}

    def load_rows(self, data: DataConfig, which: Which, seed: int) -> list[Row]:
        """Normalized rows of the calibration, evaluation or training set, sampled with ``seed``.

        Calibration and training rows come in random order, so that their first n are a fair sample; evaluation rows in
        their own. Without ``data.train`` the training rows come from the calibration data.

        Raises:
            DataError: fewer rows than asked for, and what :meth:`all_rows` raises.
        """
        rows = self.all_rows(data, which)
        return self.sample(rows, which, data.n_examples(which, len(rows)), seed)

    def all_rows(self, data: DataConfig, which: Which) -> list[Row]:
        """Normalized rows of a data set, all of them in their order.

        Raises:
            DataError: nothing configured, missing, empty, or columns are missing.
        """
        source, split = self.source(data, which)
        if source is None:
            asked = "data.train or data.calibration" if which == "train" else f"data.{which}"
            instead = ", or data.generated: {}, which has the dense model write text" if self.is_causal else ""
            raise DataError(
                f"expected {asked} in the recipe, found none; give a data file or a `datasets` name{instead}"
            )
        raw = read_rows(source, split=split, config_name=data.config_name, revision=data.revision)
        try:
            return self.normalize_rows(raw, data, which)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error

    def sample(self, rows: list[Row], which: Which, count: int | None, seed: int) -> list[Row]:
        """``count`` normalized rows, drawn with ``seed``; all for None.

        Raises:
            DataError: there are fewer.
        """
        return sample_rows(rows, count, seed, field=f"n_{which}", shuffle=which != "evaluation")

    def settle_rows(self, rows: list[Row], data: DataConfig, which: Which, seed: int, processor: Any) -> list[Row]:
        """Rows as examples are made of them, once the processor is known: what :meth:`load_rows` gives, for most tasks.

        Raises:
            DataError: too few rows for what is asked for.
        """
        if which == "evaluation" and self.has_classes and rows and "label" in rows[0]:
            check_examples(self.metric_name, (self.example_labels(row) for row in rows))
        return rows

    def example_labels(self, row: Row) -> Collection[str]:
        """Names of the labels of a checked row, for metrics of one of them."""
        return {row["label_names"][row["label"]]}

    def linked_files_hash(self, source: str, data: DataConfig) -> str:
        """Stands for the content of files that a data file names; empty where rows hold all themselves."""
        return ""

    @staticmethod
    def source(data: DataConfig, which: Which) -> tuple[str | None, str]:
        """Data file or `datasets` name, and the split of it that is meant in the latter case."""
        if which == "evaluation":
            return data.evaluation, data.evaluation_split
        if which == "train" and data.train is not None:
            return data.train, data.train_split
        return data.calibration, data.calibration_split

    @abstractmethod
    def normalize_rows(self, raw: list[Row], data: DataConfig, which: Which) -> list[Row]:
        """Bring raw rows to the keys that this task's other methods read; raises :class:`DataError`."""

    def columns(
        self, raw: list[Row], data: DataConfig, usual: Sequence[Sequence[str]] | None = None
    ) -> tuple[str, ...]:
        """Columns with the input, as asked for in the recipe or by their usual names."""
        what = "image" if self.input_kind == "image" else "text"
        usual = self.text_columns if usual is None else usual
        return find_columns(raw, data.text_columns, usual, what=what, field="text_columns")

    def find_label_column(self, raw: list[Row], data: DataConfig, which: Which) -> str | None:
        """Column with the label; None where there is none and none is needed: not for evaluation."""
        if which != "evaluation" and data.label_column is None and not set(self.label_columns) & set(raw[0]):
            return None
        asked = None if data.label_column is None else [data.label_column]
        usual = [[name] for name in self.label_columns]
        return find_columns(raw, asked, usual, what="label", field="label_column")[0]

    def check_labels(self, rows: list[Row], config: Any) -> list[Row]:
        """Rows whose labels are in the model's numbering; use these from here on. Tasks without classes: unchanged.

        Raises:
            DataError: a label is no name in ``config.id2label``, nor a number below ``config.num_labels``.
        """
        return rows

    def label_reading(self, rows: list[Row], config: Any) -> LabelReading | None:
        """How the labels of rows as loaded are read; None for tasks without classes, and where there is but one way."""
        return None

    def label_note(self, rows: list[Row], config: Any) -> str | None:
        """What may surprise about how labels are read, for rows as loaded; None where nothing does, or no classes."""
        reading = self.label_reading(rows, config)
        return None if reading is None else reading.note

    @abstractmethod
    def head_settings(self, rows: list[Row]) -> dict[str, Any]:
        """Settings of the config for a new head that fits labelled training rows; empty if heads are all alike.

        Raises:
            DataError: rows without labels, or with labels that make no head of this task.
        """

    @staticmethod
    def unlabelled(rows: list[Row]) -> list[Row]:
        """Rows without their labels, for training that reads none: they need not fit the model's head."""
        return [
            {key: value for key, value in row.items() if key not in ("label", "label_names", "answers", "answer_start")}
            for row in rows
        ]

    @abstractmethod
    def encode(self, data: EvaluationSet, *, sort: bool = True) -> list[Batch]:
        """Model inputs, one example a row: tensors [batch, length], padded as ``data`` says; the last may be smaller.

        ``sort`` orders the examples by length, so that batches carry little padding.
        """

    def token_lengths(self, rows: list[Row], processor: Any) -> list[int]:
        """Tokens of every example of the rows, before any is cut; empty for images."""
        return [] if self.input_kind == "image" else token_lengths(processor, rows)

    def inputs(self, rows: list[Row]) -> list[Any]:
        """What of the rows a model sees, as something hashable: rows of two data sets with the same are the same."""
        return [tuple(sorted((name, str(value)) for name, value in row.items())) for row in self.unlabelled(rows)]

    def shared(self, rows: list[Row], others: list[Row]) -> tuple[int, int]:
        """How many inputs of the rows are inputs of others, too; and of how many."""
        seen, own = set(self.inputs(others)), self.inputs(rows)
        return sum(each in seen for each in own), len(own)

    @abstractmethod
    def examples(self, rows: list[Row], processor: Any, max_length: int) -> list[Batch]:
        """Training examples, one a row and in the rows' order, with labels by :attr:`label_names` if the rows have any.

        Inputs are unpadded tensors [1, length], labels [1] or, one a token, [1, length].

        Raises:
            DataError: some rows have labels and some have not, or labels that check_labels has not seen.
        """

    def collate(self, examples: list[Batch], processor: Any) -> Batch:
        """Examples as one batch [len(examples), longest]; tokens of padding have label -100.

        Raises:
            DataError: an example has other inputs or labels than the first.
        """
        return collate_examples(examples, processor)

    @abstractmethod
    def outcomes(self, function: ModelFunction, data: EvaluationSet) -> Outcomes:
        """What the model did on each labelled row, in the rows' order: what :attr:`metrics` are computed from."""

    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes | None:
        """Two made-up examples beside these, one answered rightly and one wrongly, that change a score the least.

        Intervals take them in, see :mod:`ziplm_deploy.tasks.resampling`; None where answers are numbers, which are no
        more right or wrong.
        """
        return None

    def scores(self, outcomes: Outcomes) -> dict[str, float]:
        """All metrics of these examples, 1 is best; the primary one first."""
        return {name: score(self.metrics[name], outcomes) for name in dict.fromkeys((self.metric_name, *self.metrics))}

    def evaluate(self, function: ModelFunction, data: EvaluationSet) -> dict[str, float]:
        """All metrics on labelled rows, 1 is best; the primary one first."""
        return self.scores(self.outcomes(function, data))

    def label_scores(self, outcomes: Outcomes, config: Any) -> dict[str, float]:
        """F1 of every class or type of entity by its name in the model's configuration; empty for tasks without."""
        return {}

    def fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> dict[str, float]:
        """Closeness of the outputs to the dense model's, needing no labels; empty where the metric says enough.

        ``dense_data``: the examples of ``data`` as the dense model takes them, perhaps in larger batches.
        """
        return {}

    def outcomes_and_fidelity(
        self, function: ModelFunction, dense: ModelFunction, data: EvaluationSet, dense_data: EvaluationSet
    ) -> tuple[Outcomes, dict[str, float]]:
        """Both :meth:`outcomes` and :meth:`fidelity`, with no more calls of ``function`` than one of them needs.

        Embeddings and scores of pairs are remembered by :func:`cache_embeddings`; a task with larger outputs overrides
        this.
        """
        return self.outcomes(function, data), self.fidelity(function, dense, data, dense_data)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named outputs of a torch model; labels and inputs that it does not take are left out."""
        inner = unwrapped(model)
        accepted = _parameters(type(inner).forward) - set(self.label_names)
        if not knows_segments(inner):
            accepted -= {"token_type_ids"}
        outputs = model(**{name: value for name, value in batch.items() if name in accepted})
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def shortened(self, rows: list[Row], context: int | None) -> list[Row]:
        """Rows for the search, which compares many plans on them; only windows of text can be cut."""
        return rows

    @abstractmethod
    def features(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Features that :meth:`divergence` compares: rows of logits, or embeddings, without padding."""

    def compared(self, model: nn.Module, batch: Batch) -> Tensor:
        """:meth:`features` of a torch model's answer to ``batch``, computed as cheaply as they can be."""
        return self.features_of_state(model, self.state(model, batch))

    def state(self, model: nn.Module, batch: Batch) -> Tensor:
        """What :meth:`features_of_state` makes :meth:`compared` of; far smaller than logits of many words."""
        return self.features(self.forward(model, batch), batch)

    def features_of_state(self, model: nn.Module, state: Tensor) -> Tensor:
        """Features of a state of ``model``, or of another that differs from it in the layers only."""
        return state

    def distilled(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """Features that a student learns; those of the search, but for tasks that compare a part of them there."""
        return self.features(outputs, batch)

    def divergence(self, candidate: Tensor, dense: Tensor) -> Tensor:
        """Mean KL(dense ‖ candidate) over the last dimension of logits ``[…, classes]``; a scalar ≥ 0."""
        return kl_divergence(candidate, dense)

    def sampled_loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """A drawn scalar: the mean outer product of its gradient is the Hessian of the divergence, summed over rows.

        ``features``: of the dense model, with a gradient.
        """
        return sampled_cross_entropy(features, generator)

    def distillation_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Distance of the student's features to the teacher's; a scalar ≥ 0, whose gradient reaches the student only.

        T² · KL(teacher / T ‖ student / T): T² keeps the size of the gradient at every T (Hinton et al., 2015).
        """
        soft_student, soft_teacher = student.float() / temperature, teacher.detach().float() / temperature
        return temperature**2 * self.divergence(soft_student, soft_teacher)

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The task's own loss against the labels: mean cross-entropy of ``logits`` over labelled rows or tokens.

        Raises:
            DataError: the batch has no labels.
        """
        (labels,) = self.labels(batch)
        return cross_entropy(outputs["logits"], labels)

    def labels(self, batch: Batch) -> list[Tensor]:
        """The labels of a training batch by :attr:`label_names`; raises :class:`DataError` if one is missing."""
        if not self.label_names or not all(name in batch for name in self.label_names):
            raise DataError(
                f"expected labelled training data for the loss of {self.name}, found none; give data.train with labels "
                "(data.label_column), or set recover.task_weight to 0"
            )
        return [batch[name] for name in self.label_names]


def knows_segments(model: nn.Module) -> bool:
    """Whether a model can tell two segments by ``token_type_ids``; others have no embedding for the second."""
    types = getattr(getattr(model, "config", None), "type_vocab_size", 2)
    return not isinstance(types, int) or types >= 2


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of a wrapper of several processes, which takes any input; others as they are."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def torch_function(task: Task, model: nn.Module) -> ModelFunction:
    """A torch model as a function of named arrays, to evaluate it exactly as an ONNX file is evaluated."""

    def function(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            outputs = task.forward(model, {name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return function


def class_logits(function: ModelFunction, batches: Iterator[tuple[list[int], Arrays]], n_rows: int) -> np.ndarray:
    """Logits ``[n_rows, classes]`` in row order from batches of (row indices, inputs)."""
    predicted: list[np.ndarray | None] = [None] * n_rows
    for indices, inputs in batches:
        logits = function(inputs)["logits"]
        for position, index in enumerate(indices):
            predicted[index] = logits[position]
    return np.stack([row for row in predicted if row is not None])
