"""Histograms of request lengths: read from a recipe or a file, and reduced to the few calls that are timed.

Latency is nearly linear in the length over a short range. So a bin of neighbouring lengths is timed at its mean: the
weights of its lengths add up exactly, and with them the mean of all, but for the rounding to whole tokens.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ziplm_deploy.documents import MAX_JSON_BYTES, parse_json, read_text, shown

MAX_CALLS = 8  # lengths that are timed: each costs as much measuring as a workload of one
MIN_TOKENS, MAX_TOKENS = 4, 8192  # of a call
TEXT_SUFFIXES = (".jsonl", ".ndjson")  # with a text in each line, whose tokens are counted when the run starts
SUFFIXES = (".csv", ".json", ".txt", *TEXT_SUFFIXES)

MAX_LINE = 1 << 16  # characters of a line that are looked at
Histogram = dict[int, float]  # tokens: weight


def read_histogram(path: Path) -> Histogram | None:
    """Histogram of a file of lengths; None for a file of texts, whose tokens only a tokenizer can count.

    JSON holds a list of lengths or ``{tokens: weight}``; CSV lengths or lengths and weights, with or without a header;
    ``.txt`` one length a line, or else one text a line: its first line tells.

    Raises:
        ValueError: missing, unreadable, empty, of another type, or with entries that are no lengths.
    """
    if not os.path.isfile(path):  # False for a name too long for any file
        raise ValueError(f"expected a file of lengths or texts at {path}, found none; check the path")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"expected a file of type {', '.join(SUFFIXES)} with lengths or texts, found {path.name}")
    if suffix in TEXT_SUFFIXES:
        return None
    try:
        if suffix == ".txt" and _is_text(path):  # of any size
            return None
        text = read_text(path, MAX_JSON_BYTES).removeprefix("\ufeff")
        return {".csv": _of_csv, ".json": _of_json, ".txt": _of_lines}[suffix](text)
    except OSError as error:
        raise ValueError(f"expected readable lengths in {path}, found: {error}; check the file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def checked_histogram(raw: Mapping[Any, Any]) -> Histogram:
    """Lengths and their weights as numbers, ascending, those without weight left out.

    Raises:
        ValueError: no entries, a length that is no whole number from 1 to 8192, or weights that are negative, not
            finite or all zero.
    """
    found: Histogram = {}
    for key, value in raw.items():
        tokens, weight = _tokens(key), _weight(value, key)
        found[tokens] = found.get(tokens, 0.0) + weight
    total = sum(found.values())
    if not found:
        raise ValueError("expected lengths of requests in tokens, found none; give at least one")
    if not 0 < total < math.inf:
        raise ValueError(f"expected weights with a sum above 0, found {shown(total)}; weights are counts or shares")
    return {tokens: found[tokens] for tokens in sorted(found) if found[tokens] > 0}


def of_lengths(lengths: Iterable[Any]) -> Histogram:
    """Histogram of the lengths of single requests; raises ``ValueError`` as :func:`checked_histogram`."""
    return checked_histogram(Counter(map(_tokens, lengths)))


def representative(histogram: Mapping[int, float], max_calls: int = MAX_CALLS) -> Histogram:
    """Histogram of at most ``max_calls`` lengths that stand for all of ``histogram``; of no more, itself.

    The longest stays alone: texts are cut at it. All others are put into neighbouring bins so that the squares of what
    lengths differ from the mean of their bin, which is what a call of that mean errs by, have the smallest weighted
    sum (k-means in one dimension, solved exactly). A bin keeps its weight; its mean is rounded up or down, whichever
    leaves the mean of all nearest to what it was. No call is shorter than 4 tokens.
    """
    lifted: Histogram = {}
    for tokens in sorted(histogram):
        lifted[max(tokens, MIN_TOKENS)] = lifted.get(max(tokens, MIN_TOKENS), 0.0) + float(histogram[tokens])
    if len(lifted) <= max_calls:
        return lifted
    lengths = np.array(list(lifted), dtype=np.float64)
    weights = np.array(list(lifted.values()))
    edges = _bins(lengths[:-1], weights[:-1], max_calls - 1)
    bins = list(zip(*(np.split(values[:-1], edges[1:-1]) for values in (lengths, weights)), strict=True))
    means = [float(np.average(tokens, weights=shares)) for tokens, shares in bins]
    sums = [math.fsum(shares) for _, shares in bins]
    return {**dict(zip(_rounded(means, sums), sums, strict=True)), int(lengths[-1]): float(weights[-1])}


def _bins(tokens: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], n_bins: int) -> list[int]:
    """Edges [n_bins + 1] of neighbouring bins with the smallest weighted sum of squares about their means."""
    n = len(tokens)
    share = weights / weights.max()
    sums = [np.concatenate([[0.0], np.cumsum(share * tokens**power)]) for power in range(3)]  # each [n + 1]

    def spread(start: npt.NDArray[np.int64], stop: int) -> npt.NDArray[np.float64]:
        weight, first, second = (each[stop] - each[start] for each in sums)
        return np.asarray(np.maximum(second - first**2 / np.maximum(weight, 1e-300), 0.0))

    best = np.full(n + 1, np.inf)  # of the first so many lengths in as many bins as there were rounds
    best[0] = 0.0
    came_from = np.zeros((n_bins, n + 1), dtype=np.int64)
    for number in range(n_bins):
        following = np.full(n + 1, np.inf)
        for stop in range(number + 1, n + 1):
            starts = np.arange(number, stop)
            costs = best[starts] + spread(starts, stop)
            came_from[number, stop] = starts[int(np.argmin(costs))]
            following[stop] = costs.min()
        best = following
    edges = [n]
    for number in reversed(range(n_bins)):
        edges.append(int(came_from[number, edges[-1]]))
    return edges[::-1]


def _rounded(means: list[float], weights: list[float]) -> list[int]:
    """Whole tokens next to each mean, so chosen that their weighted sum is nearest to that of the means."""
    choices = [sorted({math.floor(mean), math.ceil(mean)}) for mean in means]

    def shift(lengths: Iterable[int]) -> float:
        return abs(math.fsum(w * (n - mean) for w, n, mean in zip(weights, lengths, means, strict=True)))

    return list(min(itertools.product(*choices), key=shift))


def _tokens(value: Any) -> int:
    """A length in tokens; raises ``ValueError`` for anything but a whole number from 1 to 8192."""
    number = _number(value)
    if number is None or number != math.floor(number):
        raise ValueError(f"expected whole numbers of tokens, found {shown(value)}; write lengths as 128")
    if not 1 <= number <= MAX_TOKENS:
        raise ValueError(f"expected lengths from 1 to {MAX_TOKENS} tokens, found {shown(value)}; correct or remove it")
    return int(number)


def _weight(value: Any, tokens: Any) -> float:
    number = _number(value)
    if number is None or number < 0:
        raise ValueError(
            f"expected weights of 0 or more, found {shown(value)} for {shown(tokens)} tokens; weights are counts or "
            "shares of requests"
        )
    return number


def _number(value: Any) -> float | None:
    """A finite number, written as one or as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_number(text: str) -> bool:
    return _number(text) is not None


def _is_text(path: Path) -> bool:
    """Whether the first line that is not blank is no number."""
    with path.open(encoding="utf-8-sig") as stream:
        while line := stream.readline(MAX_LINE):
            if line.strip():
                return not _is_number(line.strip())
    return False


def _of_lines(text: str) -> Histogram:
    lengths = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not _is_number(line):
            raise ValueError(
                f"expected a length in tokens in every line, as in the first, found {shown(line.strip())} in line "
                f"{number}; write texts that begin with a number as JSON lines"
            )
        lengths += [line] if line.strip() else []
    return of_lengths(lengths)


def _of_json(text: str) -> Histogram:
    found = parse_json(text)
    if isinstance(found, dict):
        return checked_histogram(found)
    if isinstance(found, list):
        return of_lengths(found)
    raise ValueError(
        f"expected a list of lengths or {json.dumps({'128': 0.5})}, tokens and weights, found {type(found).__name__}"
    )


def _of_csv(text: str) -> Histogram:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    if rows and not any(map(_is_number, rows[0])):
        rows = rows[1:]  # the header
    widths = {len(row) for row in rows}
    if widths - {1, 2} or len(widths) > 1:
        raise ValueError(
            f"expected one column of lengths, or two of lengths and weights, found rows of {sorted(widths)} cells; "
            "write texts as JSON lines"
        )
    if widths == {1}:
        return of_lengths(row[0] for row in rows)
    totals: dict[int, float] = {}
    for length, weight in rows:
        totals[_tokens(length)] = totals.get(_tokens(length), 0.0) + _weight(weight, length)
    return checked_histogram(totals)
