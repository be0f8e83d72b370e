"""How the labels of a data set are read: as names of a model's classes, or as their numbers.

One rule for all formats, whether a file holds ``2``, ``2.0`` or ``"2"``:

- A class that the data set names is the model's class of that name. Where the model has none of the names, numbers are
  compared, which a note says.
- A text is the name of a class.
- A number, spelled or not, is a name if names of the model spell all numbers among the labels (``"1"`` to ``"5"``, or
  ``"001"`` and ``"1.0"``), and else the class's number from 0.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.class_names import NamedClass

_SHOWN = 12  # names in a message
_NO_NAME = re.compile(r"LABEL_\d+|\d+")


@dataclass(frozen=True)
class LabelReading:
    """The model's class of every label of a data set; ``note`` says what may surprise about it."""

    names: tuple[str, ...]  # of the model's classes, by number
    set_names_count: bool  # names of the data set decide, where it has some
    numbers_are_names: bool
    note: str | None = None
    set_names: tuple[str, ...] = ()  # of the data set's classes, where it says more than numbers
    has_numbers: bool = False  # without names of the data set

    def is_unlike(self, other: LabelReading) -> bool:
        """Whether a number is the name of a class in one data set, and counts from 0 in the other."""
        if not (self.has_numbers and other.has_numbers) or self.numbers_are_names == other.numbers_are_names:
            return False
        named = self if self.numbers_are_names else other
        return named.note is not None  # else its names count from 0, too

    def number(self, label: Any, row: int) -> int:
        """The class number of a label; ``row`` is its row's, from 1.

        Raises:
            DataError: no such class; names the row and the labels that the model knows.
        """
        index = self._find(label)
        if index is not None:
            return index
        found = label.name or int(label) if isinstance(label, NamedClass) and self.set_names_count else label
        raise DataError(
            f"expected labels of the model's head, 0 to {len(self.names) - 1} or one of "
            f"{', '.join(self.names[:_SHOWN])}, found {found!r} in row {row}; use a model whose head fits the data, or "
            "rename the labels (-1 marks test splits without labels)"
        )

    def _find(self, label: Any) -> int | None:
        if isinstance(label, NamedClass) and self.set_names_count:
            return None if label.name is None else _index_of(label.name, self.names)
        number = whole_number(label)
        if number is None:
            return _index_of(label, self.names) if isinstance(label, str) else None
        if self.numbers_are_names:
            return self._spelling.class_of(label, number)
        return number if 0 <= number < len(self.names) else None

    @functools.cached_property
    def _spelling(self) -> _Spelling:
        return _Spelling.of(self.names)


@dataclass(frozen=True)
class _Spelling:
    """Classes by what their names spell."""

    texts: dict[str, int]
    numbers: dict[int, int]  # that are the name of just one

    @classmethod
    def of(cls, names: Sequence[str]) -> _Spelling:
        spelled = [(number, index) for index, name in enumerate(names) if (number := whole_number(name)) is not None]
        counts = Counter(number for number, _ in spelled)
        texts = {name: index for index, name in reversed([*enumerate(names)])}  # the first of equal ones
        return cls(texts, {number: index for number, index in spelled if counts[number] == 1})

    def class_of(self, label: Any, number: int) -> int | None:
        """Class with a number as its name: as it is written, else the only one that spells the number."""
        written = self.texts.get(label) if isinstance(label, str) else None
        return self.numbers.get(number) if written is None else written


def read_labels(labels: Sequence[Any], config: Any) -> LabelReading:
    """How all labels of a data set are read with the classes of a model's configuration."""
    id2label: Mapping[int, str] = config.id2label or {}
    names = tuple(str(id2label.get(index, index)) for index in range(config.num_labels))
    known = next((label.names for label in labels if isinstance(label, NamedClass)), ())
    if all(name == str(number) for number, name in enumerate(known)):
        known = ()  # these say no more than the numbers
    by_name = any(_index_of(name, names) is not None for name in known)
    numbers = [(label, number) for label in labels if (number := whole_number(label)) is not None]
    spelling = _Spelling.of(names)
    classes = [] if known else [spelling.class_of(label, number) for label, number in numbers]
    spelled = bool(classes) and None not in classes
    note = None
    if known and not by_name:
        note = _unknown_names(known, names)
    elif spelled and any(index != number for index, (_, number) in zip(classes, numbers, strict=True)):
        note = (
            f"the numbers among the labels are read as the model's class names ({_listed(names)}), not as class "
            f"numbers from 0"
        )
    return LabelReading(names, by_name, spelled, note, known, bool(numbers) and not known)


def are_unnamed(names: Sequence[str]) -> bool:
    """Whether these names of classes say no more than their numbers: ``LABEL_0``, ``0``."""
    return all(map(_NO_NAME.fullmatch, names))


def _unknown_names(known: tuple[str, ...], names: tuple[str, ...]) -> str:
    what = "no names" if are_unnamed(names) else f"other names ({_listed(names)})"
    return (
        f"the data set names its classes ({_listed(known)}), the model has {what}: class numbers are compared; check "
        "that both count in the same order, or write the names into id2label of the model's config.json"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


@functools.lru_cache(maxsize=1 << 16)
def _index_of(label: str, names: tuple[str, ...]) -> int | None:
    """Position of a name: as it stands, then whatever its case, then with ``_``, ``-`` and spaces alike."""
    for fold in (str, _without_case, _without_separators):
        matches = [index for index, name in enumerate(names) if fold(name) == fold(label)]
        if len(matches) == 1:
            return matches[0]
    return None


def _without_case(name: str) -> str:
    return name.strip().casefold()


def _without_separators(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", _without_case(name))


def whole_number(value: Any) -> int | None:
    """The integer that a label is or spells (``2``, ``2.0``, ``"2"``), or None."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None
