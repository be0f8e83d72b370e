"""F1 of one label as the metric of a recipe, ``f1:NAME``: where a single class or type of entity is what counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.tasks.metrics import Floats, Metric, f1_of_counts
from ziplm_deploy.tasks.outcomes import Outcomes

PREFIX = "f1:"
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


def check_label(metric: str, names: Sequence[str], present: Collection[str] | None) -> None:
    """Refuse a metric of a label that the model does not have, or that no example has.

    Args:
        names: labels of the model.
        present: labels of the examples; None where there are none yet.

    Raises:
        RecipeError: no such label; lists those there are.
        DataError: no example has it, so that its F1 would be 0 whatever a model answers.
    """
    label = label_of(metric)
    if label is None:
        return
    if label not in names:
        shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
        raise RecipeError(f"expected a label of the model in model.metric ({shown}), found {label!r}; correct it")
    if present is not None and label not in present:
        raise DataError(
            f"expected examples of {label!r}, by whose F1 model.metric goes, found none; give other examples, or "
            "choose another metric"
        )
