"""F1 of one label as the metric of a recipe, ``f1:NAME``: where a single class or type of entity is what counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.tasks.metrics import Floats, Metric, f1_of_counts
from ziplm_deploy.tasks.outcomes import Outcomes

PREFIX = "f1:"
MIN_EXAMPLES = 8  # one half chooses by it, the other is reported
_SHOWN = 20


def label_of(metric: str) -> str | None:
    """The label whose F1 a metric is; None for any other metric."""
    return metric.removeprefix(PREFIX) if metric.startswith(PREFIX) else None


def f1_of_label(label: str) -> Metric:
    """F1 of the class, or of the type of entities, that has this name among those of the outcomes."""

    def metric(outcomes: Outcomes, counts: Floats) -> Floats:
        number = outcomes.names.index(label)
        if "predicted" in outcomes.arrays:
            expected, found = ((outcomes[name] == number).astype(np.int64) for name in ("label", "predicted"))
            return f1_of_counts(expected * found, found, expected, counts)
        right, found, expected = (outcomes[name][:, number] for name in ("right", "found", "expected"))
        return f1_of_counts(right, found, expected, counts)

    return metric


def label_number(metric: str, outcomes: Outcomes) -> int | None:
    """Place of a metric's label among the names of outcomes; None for any other metric."""
    label = label_of(metric)
    return None if label is None else outcomes.names.index(label)


def check_label(metric: str, names: Sequence[str]) -> None:
    """Raise :class:`RecipeError` for a metric of a label that is none of the model's; lists those there are."""
    label = label_of(metric)
    if label is not None and label not in names:
        shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
        raise RecipeError(f"expected a label of the model in model.metric ({shown}), found {label!r}; correct it")


def check_examples(metric: str, labels: Iterable[Collection[str]]) -> None:
    """Refuse a metric of a label that too few evaluation examples have for their halves to tell anything of it.

    Args:
        labels: of every example.

    Raises:
        DataError: fewer than 8 have it.
    """
    label = label_of(metric)
    if label is None:
        return
    count = sum(label in each for each in labels)
    if count < MIN_EXAMPLES:
        raise DataError(
            f"expected {MIN_EXAMPLES} or more evaluation examples of {label!r}, by whose F1 model.metric goes, found "
            f"{count}; give more of them, or choose another metric"
        )
