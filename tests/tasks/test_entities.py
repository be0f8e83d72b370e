"""Entities: what every scheme writes for given entities is read back as these."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ziplm_deploy.tasks.entities import Entity, TagScheme

TYPES = ["PER", "LOC-X", "B"]
Writer = Callable[[Entity, bool, bool], list[str]]  # entity, touches one of its type before, after → letters


def _ends(inside: str, first: str, last: str, single: str) -> Writer:
    def write(entity: Entity, before: bool, after: bool) -> list[str]:
        size = entity[2] - entity[1] + 1
        return [single] if size == 1 else [first, *[inside] * (size - 2), last]

    return write


def _iob1(entity: Entity, before: bool, after: bool) -> list[str]:
    return ["B" if before else "I", *["I"] * (entity[2] - entity[1])]


def _ioe1(entity: Entity, before: bool, after: bool) -> list[str]:
    return [*["I"] * (entity[2] - entity[1]), "E" if after else "I"]


SCHEMES: dict[str, Writer] = {
    "IOB1": _iob1,
    "IOE1": _ioe1,
    "IOB2": _ends("I", "B", "I", "B"),
    "IOE2": _ends("I", "I", "E", "E"),
    "IOBES": _ends("I", "B", "E", "S"),
    "BILOU": _ends("I", "B", "L", "U"),
    "BMEWO": _ends("M", "B", "E", "W"),
}
STYLES: dict[str, Callable[[str, str], str]] = {
    "before": lambda letter, kind: f"{letter}-{kind}",
    "underscore": lambda letter, kind: f"{letter}_{kind}",
    "after": lambda letter, kind: f"{kind}-{letter}",
    "alone": lambda letter, kind: letter,
}


def some_entities(rng: random.Random, length: int, types: list[str]) -> list[Entity]:
    """Entities in order that do not overlap; many touch."""
    found, position = [], 0
    while position < length:
        size = min(rng.randint(1, 3), length - position)
        if rng.random() < 0.7:
            found.append((rng.choice(types), position, position + size - 1))
        position += size
    return found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_scheme_writes_is_read_back(scheme: str, style: str) -> None:
    rng, types = random.Random(0), [""] if style == "alone" else TYPES
    letters = {letter for letter in scheme.rstrip("12") if letter != "O"}
    names = ["O", *sorted(STYLES[style](letter, kind) for letter in letters for kind in types)]
    reader = TagScheme.of(names)
    for _ in range(100):
        wanted = some_entities(rng, 12, types)
        tags = ["O"] * 12
        ends = {(kind, last) for kind, _, last in wanted}
        begins = {(kind, first) for kind, first, _ in wanted}
        for entity in wanted:
            kind, first, last = entity
            written = SCHEMES[scheme](entity, (kind, first - 1) in ends, (kind, last + 1) in begins)
            tags[first : last + 1] = [STYLES[style](letter, kind) for letter in written]
        assert set(tags) <= set(names)
        assert reader.entities(tags) == set(wanted), tags


def test_bare_tags_make_one_entity_of_several_words() -> None:
    reader = TagScheme.of(["O", "B", "I"])
    assert reader.entities(["B", "I", "O", "B", "B"]) == {("", 0, 1), ("", 3, 3), ("", 4, 4)}


def test_tags_without_letters_are_an_entity_a_word() -> None:
    for names in (["NOUN", "VERB", "O"], ["PER", "LOC"], ["S-BAHN", "U-BAHN", "O"], ["N", "V", "B"]):
        tags = [names[0], names[0], names[1]]
        assert len(TagScheme.of(names).entities(tags)) == 3, names


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["I-A", "I-A"], {("A", 0, 1)}),  # IOB1, or a model that forgot the B
        (["B-A", "I-B"], {("A", 0, 0), ("B", 1, 1)}),
        (["B-A", "O", "I-A"], {("A", 0, 0), ("A", 2, 2)}),
        (["MISC", "I-A"], {("MISC", 0, 0), ("A", 1, 1)}),
        ([], set()),
    ],
)
def test_sequences_that_no_scheme_writes_are_read_as_conlleval_does(tags: list[str], entities: set[Entity]) -> None:
    assert TagScheme.of(["O", "B-A", "I-A", "B-B", "I-B", "MISC"]).entities(tags) == entities
