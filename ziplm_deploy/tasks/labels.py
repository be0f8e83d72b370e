"""Class labels: whether rows have them, in the numbering of a model's head, and the head that they would need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.data import Row

MAX_CLASSES = 10_000  # larger numbers are ids of something else; a head for them would only fill the memory


def labels_of(rows: list[Row], key: str = "label") -> list[Any] | None:
    """The labels of all rows, or None if no row has one.

    Raises:
        DataError: some rows have one and some have not; names the first that has not.
    """
    labels = [row.get(key) for row in rows]
    missing = [number for number, label in enumerate(labels, 1) if label is None]
    if rows and len(missing) == len(rows):
        return None
    if missing:
        raise DataError(
            f"expected a label in every row or in none, found none in row {missing[0]} ({len(missing)} of {len(rows)} "
            "rows); label or remove those rows"
        )
    return labels


def require_labels(rows: list[Row], key: str = "label") -> list[Any]:
    """The labels of all rows, to make a new head for; raises :class:`DataError` where there are none."""
    labels = labels_of(rows, key)
    if not labels:
        raise DataError(
            "expected labelled training data to fit a new head to, found none; name the column in data.label_column, "
            "or give labelled data.train"
        )
    return labels


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
    index = whole_number(value)
    if index is not None and 0 <= index < config.num_labels:
        return index
    known = ", ".join(sorted(names, key=lambda name: names[name])[:12])
    raise DataError(
        f"expected labels of the model's head, 0 to {config.num_labels - 1} or one of {known}, found {value!r} in row "
        f"{number}; use a model whose head fits the data, or rename the labels (-1 marks test splits without labels)"
    )


def whole_number(value: Any) -> int | None:
    """The integer that a label is or spells (``2``, ``2.0``, ``"2"``), or None."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def check_class_labels(rows: list[Row], config: Any) -> list[Row]:
    """Rows with one class number each, by the model's head; raises :class:`DataError` as :func:`map_label` does."""
    if config.num_labels < 2:
        raise DataError(
            f"expected a classifier with two or more labels, found a head with {config.num_labels} (regression); for "
            "texts with a score set model.task to text-regression"
        )
    return [
        {**row, "label": map_label(row["label"], config, number)} if "label" in row else row
        for number, row in enumerate(rows, 1)
    ]


def class_numbers(rows: list[Row]) -> list[int]:
    """Labels of the rows; raises :class:`DataError` where they were not checked against the head."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("label"), int):
            raise DataError(
                f"expected a class number as label in row {number}, found {row.get('label')!r}; pass the rows that "
                "check_labels returned"
            )
    return [row["label"] for row in rows]


def class_head(labels: Iterable[Any]) -> dict[str, Any]:
    """Settings of a new head: ``num_labels``, ``id2label``, ``label2id``.

    Whole numbers stay the classes' numbers and are their names, too; other labels are names, numbered in their
    alphabetical order.

    Raises:
        DataError: fewer than two classes, numbers that cannot count classes, or fractions.
    """
    distinct = {label.strip() if isinstance(label, str) else label for label in labels}
    numbers = {whole_number(label) for label in distinct}
    if None not in numbers:
        names = _numbered_names(sorted(number for number in numbers if number is not None))
    elif all(isinstance(label, str) and not _is_fraction(label) for label in distinct):
        names = sorted(distinct)
    else:
        example = next(label for label in distinct if not isinstance(label, str) or _is_fraction(label))
        raise DataError(
            f"expected classes as whole numbers or as names, found also {example!r}; name the classes, or set "
            "model.task to text-regression if these are scores of texts"
        )
    if len(distinct if None in numbers else numbers) < 2:
        raise DataError(f"expected two or more classes in the training data, found {names[-1:]}; add rows of others")
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _numbered_names(numbers: list[int]) -> list[str]:
    """Names of the classes 0 to the largest of sorted numbers; classes between them may lack examples."""
    if numbers and not 0 <= numbers[0] <= numbers[-1] < MAX_CLASSES:
        raise DataError(
            f"expected class numbers from 0 to at most {MAX_CLASSES - 1}, found {numbers[0]} to {numbers[-1]}; number "
            "the classes from 0, or name them (-1 marks test splits without labels)"
        )
    return [str(number) for number in range(numbers[-1] + 1)] if numbers else []


def _is_fraction(label: str) -> bool:
    try:
        return math.isfinite(float(label)) and whole_number(label) is None
    except ValueError:
        return False
