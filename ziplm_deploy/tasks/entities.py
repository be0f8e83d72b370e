"""Entities in tagged words, by the rules of conlleval, for every common tagging scheme.

A scheme marks the words of an entity by letters: IOB1 and IOB2 (B begin, I inside), IOE1 and IOE2 (E end), IOBES
(S single), BILOU (L last, U unit) and BMEWO (M middle, W whole). They are read by one rule: an entity begins at B or S,
and at any of its letters after a word that is outside, has another type or has ended one; it ends at E or S, and before
a word that begins another. The letter stands before the type (``B-PER``, ``B_PER``), after it (``PER-B``) or alone,
where there is but one type. Tags without letters, such as parts of speech, make every word an entity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Entity = tuple[str, int, int]  # type, first word, last word

OUTSIDE = "O"
_SAME = {"L": "E", "U": "S", "W": "S", "M": "I"}
_LETTERS = "BIESLUMW"
_BEFORE, _AFTER = re.compile(rf"([{_LETTERS}])[-_](.+)"), re.compile(rf"(.+)[-_]([{_LETTERS}])")


@dataclass(frozen=True)
class TagScheme:
    """How tags say where entities begin and end: a letter and a type for every tag."""

    parts: dict[str, tuple[str, str]]  # tag → (B, I, E, S or O; type)

    @classmethod
    def of(cls, names: Sequence[str]) -> TagScheme:
        """The scheme that the names of all classes show."""
        tags = [name for name in names if name != OUTSIDE]
        if _are_letters(tags):
            parts = {tag: (tag, "") for tag in tags}
        elif not _mark_all(_BEFORE, tags, 1) and _mark_all(_AFTER, tags, 2):
            parts = {tag: (match[2], match[1]) for tag in tags if (match := _AFTER.fullmatch(tag))}
        elif _mark_all(_BEFORE, tags, 1) or any(tag.startswith(("B-", "I-")) for tag in tags):
            parts = {tag: (match[1], match[2]) if (match := _BEFORE.fullmatch(tag)) else ("S", tag) for tag in tags}
        else:
            parts = {tag: ("S", tag) for tag in tags}
        return cls({tag: (_SAME.get(letter, letter), kind) for tag, (letter, kind) in parts.items()})

    def entities(self, tags: Sequence[str]) -> set[Entity]:
        """Entities of one row of tags."""
        found: set[Entity] = set()
        first: int | None = None
        before = (OUTSIDE, "")
        for position, tag in enumerate([*tags, OUTSIDE]):
            letter, kind = self.parts.get(tag, (OUTSIDE, ""))
            continues = letter in "IE" and before[0] in "BI" and kind == before[1]
            if first is not None and not continues:
                found.add((before[1], first, position - 1))
                first = None
            if first is None and letter != OUTSIDE:
                first = position
            before = (letter, kind)
        return found


def _are_letters(tags: Sequence[str]) -> bool:
    return bool({"B", "I"} & set(tags)) and all(tag in _LETTERS for tag in tags)


def _mark_all(pattern: re.Pattern[str], tags: Sequence[str], letter: int) -> bool:
    """Whether all tags have a letter there, one of them B or I, without which letters are part of names."""
    matches = [pattern.fullmatch(tag) for tag in tags]
    return all(matches) and any(match is not None and match.group(letter) in "BI" for match in matches)
