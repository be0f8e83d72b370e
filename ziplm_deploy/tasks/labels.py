"""Class labels: whether rows have them, in the numbering of a model's head, and the head that they would need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.class_names import NamedClass
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.label_reading import read_labels, whole_number

MULTI_LABEL = "multi_label_classification"  # problem_type of transformers
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


def check_class_labels(rows: list[Row], config: Any) -> list[Row]:
    """Rows with one class number each, by the model's head.

    Raises:
        DataError: a label is no class of the model's; names the row and the labels that the model knows.
    """
    if config.num_labels < 2:
        raise DataError(
            f"expected a classifier with two or more labels, found a head with {config.num_labels} (regression); for "
            "texts with a score set model.task to text-regression"
        )
    if getattr(config, "problem_type", None) == MULTI_LABEL:
        raise DataError(
            f"expected a head for one class an example, found one for several (problem_type {MULTI_LABEL}); set "
            "model.task to multi-label-classification for texts; images with several labels are not supported"
        )
    reading = read_labels(labels_in(rows), config)
    return [
        {**row, "label": reading.number(row["label"], number)} if "label" in row else row
        for number, row in enumerate(rows, 1)
    ]


def labels_in(rows: list[Row]) -> list[Any]:
    """The labels that rows have, those of lists one by one."""
    found = [row["label"] for row in rows if "label" in row]
    return [label for each in found for label in (each if isinstance(each, list) else [each])]


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
    """Settings of a new head: ``num_labels``, ``id2label``, ``label2id``, and no ``problem_type`` of an older head.

    Classes that the data set names keep its order. Other whole numbers stay the classes' numbers and are their names,
    too; other labels are names, numbered in their alphabetical order.

    Raises:
        DataError: fewer than two classes, numbers that cannot count classes, or fractions.
    """
    labels = list(labels)
    distinct = {label.strip() if isinstance(label, str) else label for label in labels}
    numbers = {whole_number(label) for label in distinct}
    names = _names_of_data_set(labels) or _names_of_labels(distinct, numbers)
    if len(distinct if None in numbers else numbers) < 2:
        raise DataError(f"expected two or more classes in the training data, found {names[-1:]}; add rows of others")
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": None,
    }


def _names_of_labels(distinct: set[Any], numbers: set[int | None]) -> list[str]:
    """Names of the classes of distinct labels, by number; ``numbers`` are those that they spell."""
    if None not in numbers:
        return _numbered_names(sorted(number for number in numbers if number is not None))
    if all(isinstance(label, str) and not _is_fraction(label) for label in distinct):
        return sorted(distinct)
    example = next(label for label in distinct if not isinstance(label, str) or _is_fraction(label))
    raise DataError(
        f"expected classes as whole numbers or as names, found also {example!r}; name the classes, or set "
        "model.task to text-regression if these are scores of texts"
    )


def _names_of_data_set(labels: list[Any]) -> list[str]:
    """Names of all classes in the data set's order; empty where it names none, or not the class of every label."""
    known = {label.names if isinstance(label, NamedClass) and label.name is not None else () for label in labels}
    return list(next(iter(known))) if len(known) == 1 else []


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
