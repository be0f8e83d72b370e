"""JSON and YAML from anywhere, read as plain data within limits: a file may be damaged, or made to do damage.

Whatever is wrong with a text arrives as ``ValueError``; sizes and depths are bounded, and so is what a message repeats.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

import yaml

MAX_JSON_BYTES = 64 << 20  # a benchmark with raw samples has less than one MiB
MAX_YAML_BYTES = 256 << 10  # a recipe with every field has six KiB; PyYAML reads some 100 KiB a second
MAX_SHOWN = 80  # characters of a value in a message
MAX_MESSAGE = 2000  # characters of what others say about a text

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MAX_SHOWN


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which let a few lines stand for gigabytes, and without dates: ``2024-05-01`` is a text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor}: write out what it stands for", event.start_mark
            )
        return super().compose_node(parent, index)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_json(text: str, *, finite: bool = False) -> Any:
    """The value of a JSON text; ``finite``: NaN and infinity, which are no JSON, are refused too.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_float} if finite else {}
    try:
        return json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error


def read_json(path: Path, *, finite: bool = False, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file of at most ``max_bytes``.

    Raises:
        OSError: it cannot be read.  ValueError: too large, no UTF-8, no JSON, or nested too deeply.
    """
    return parse_json(read_text(path, max_bytes), finite=finite)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of mappings, lists, texts, numbers, booleans and null.

    Raises:
        OSError: it cannot be read.  ValueError: too large, no UTF-8, no such YAML, an alias, or nested too deeply.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # Tags and numbers in odd spellings make PyYAML raise whatever its conversions raise.
        raise ValueError(shortened(str(error))) from error


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file that is no larger than ``max_bytes``.

    Raises:
        OSError: it cannot be read.  ValueError: it is too large, or no UTF-8.
    """
    with Path(path).open("rb") as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes >> 10} KiB")
    return content.decode("utf-8")


def score_text(score: float) -> str:
    """A score with four digits after the point, or four that count where it is small, as one over a perplexity is."""
    return f"{score:.4f}" if abs(score) >= 0.1 else f"{score:.4g}"


def shown(value: object) -> str:
    """``repr`` of a value for a message: at most about 80 characters, whatever its size."""
    try:
        return shortened(_REPR.repr(value), MAX_SHOWN)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """``text``, or its beginning and end if it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shortened(text, MAX_SHOWN)}, which is too large")
    return value
