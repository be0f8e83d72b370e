"""Names that a data set gives its classes: numbers keep them until they meet the names of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NamedClass(int):
    """A class by its number in the data set, with the names of all its classes."""

    names: tuple[str, ...]

    def __new__(cls, number: int, names: tuple[str, ...] = ()) -> NamedClass:
        self = super().__new__(cls, number)
        self.names = names
        return self

    @property
    def name(self) -> str | None:
        """Name of this class; None for numbers that mark a missing label."""
        return self.names[self] if 0 <= self < len(self.names) else None


def with_class_names(rows: list[dict[str, Any]], features: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows whose class numbers know their names, as the features of a `datasets` data set give them."""
    named = {column: names for column, feature in (features or {}).items() if (names := _names_of(feature))}
    if not named:
        return rows
    return [{column: _named(value, named.get(column)) for column, value in row.items()} for row in rows]


def _names_of(feature: Any) -> tuple[str, ...]:
    """Names of a ``ClassLabel`` or of a list of them; empty for other features."""
    if isinstance(feature, list) and feature:
        return _names_of(feature[0])
    if isinstance(names := getattr(feature, "names", None), list):
        return tuple(map(str, names))
    inner = getattr(feature, "feature", None)
    return () if inner is None else _names_of(inner)


def _named(value: Any, names: tuple[str, ...] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return NamedClass(value, names) if isinstance(value, int) else value
