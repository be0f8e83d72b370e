"""Names of a model's classes, from the two maps in its configuration that say the same thing twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ziplm_deploy.documents import shortened, shown
from ziplm_deploy.errors import UnsupportedModelError

_DEFAULT_NAME = re.compile(r"LABEL_\d+")  # what transformers calls classes without names
_SHOWN = 12  # entries in a message


def settle_class_names(config: Any, raw: Mapping[str, Any], path: str) -> None:
    """Write the names that ``config.json`` gives to the classes into both maps of the configuration.

    Names that several classes share get the number of each behind them.

    Args:
        config: the configuration as transformers read it, which fills in a missing map by defaults.
        raw: ``config.json`` itself.

    Raises:
        UnsupportedModelError: classes are not numbered 0 to n - 1, or the maps disagree.
    """
    by_number = _entries(raw, "id2label", path, key_is_number=True)
    by_name = (
        by_number if _agrees(raw.get("label2id"), by_number) else _entries(raw, "label2id", path, key_is_number=False)
    )
    if by_number and by_name and by_number != by_name:
        if _says_nothing(by_number):
            by_number = {}
        elif _says_nothing(by_name):
            by_name = {}
        else:
            raise UnsupportedModelError(
                f"expected id2label and label2id in config.json of {path} to name the same classes, found "
                f"{_shown(by_number)} and {_shown(by_name)}; correct the wrong one"
            )
    names = by_number or by_name
    if not names:
        return
    times = Counter(names.values())
    config.id2label = {
        number: names[number] if times[names[number]] == 1 else f"{names[number]} ({number})"
        for number in sorted(names)
    }
    config.label2id = {name: number for number, name in config.id2label.items()}


def _entries(raw: Mapping[str, Any], field: str, path: str, *, key_is_number: bool) -> dict[int, str]:
    """Names by number; empty where ``config.json`` has no such map."""
    entries = raw.get(field) or {}
    try:
        pairs = [(int(key), name) if key_is_number else (int(name), key) for key, name in dict(entries).items()]
    except (TypeError, ValueError, OverflowError):
        pairs = []
    if not isinstance(entries, dict) or sorted(number for number, _ in pairs) != list(range(len(entries))):
        raise UnsupportedModelError(
            f"expected classes 0 to n - 1 in {field} of config.json in {path}, one for each output of the head, found "
            f"{shown(entries)}; number them as the head does"
        )
    return {number: str(name) for number, name in pairs}


def _agrees(label2id: Any, by_number: Mapping[int, str]) -> bool:
    """Whether every name stands for a class of that name; of classes with one name, such as both cranes of ImageNet,
    ``label2id`` holds only one."""
    if not isinstance(label2id, Mapping) or not label2id or set(label2id) != set(by_number.values()):
        return False
    return all(isinstance(number, int) and by_number.get(number) == name for name, number in label2id.items())


def _says_nothing(names: Mapping[int, str]) -> bool:
    return all(_DEFAULT_NAME.fullmatch(name) for name in names.values())


def _shown(names: Mapping[int, str]) -> str:
    listed = ", ".join(f"{number}: {names[number]}" for number in sorted(names)[:_SHOWN])
    return "{" + shortened(listed) + (", …" if len(names) > _SHOWN else "") + "}"
