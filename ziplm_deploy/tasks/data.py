"""Reading rows: CSV, TSV, JSON, JSON lines, Parquet and plain text files (``.gz`` allowed), or a `datasets` name.

Local files are read directly: nothing is cached, nothing touches the network, and a damaged line is named by its
number. The `datasets` library is asked only for folders and for names that are no file.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import random
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ziplm_deploy.documents import parse_json
from ziplm_deploy.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")


def read_rows(source: str, *, split: str, config_name: str | None = None) -> list[Row]:
    """Rows of a local file, or of a `datasets` folder or name.

    Raises:
        DataError: the source is missing, damaged, of an unknown format or has no rows.
    """
    path = Path(source)
    if os.path.isfile(path):  # as below: False for a name too long for any file
        rows = _read_file(path)
    elif os.path.isdir(path) or not _looks_like_path(source):
        rows = _read_dataset(source, split, config_name)
    else:
        raise DataError(
            f"expected a data file at {source}, found none; check the path (relative paths are taken from the recipe's "
            "folder, then from the current one)"
        )
    if not rows:
        raise DataError(f"expected rows in {source}, found an empty data set; give a file with at least one example")
    return rows


def _looks_like_path(source: str) -> bool:
    name = source.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES) or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1


def _read_file(path: Path) -> list[Row]:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise DataError(
            f"expected a data file of type {', '.join(SUFFIXES)} (each also as .gz), found {path.name}; convert it"
        )
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        if suffix == ".parquet":
            return _parse_parquet(content)
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's errors are ValueErrors, too
        raise DataError(f"expected a readable {suffix} file in {path}, found: {error}; make the file again") from error
    if suffix in (".csv", ".tsv"):
        return _parse_csv(text, path, delimiter="\t" if suffix == ".tsv" else ",")
    if suffix == ".txt":
        return [{"text": line.strip()} for line in text.split("\n") if line.strip()]
    return _parse_json(text, path)


def _parse_parquet(content: bytes) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = pq.read_table(pa.BufferReader(content)).to_pylist()
    return rows


def _parse_csv(text: str, path: Path, delimiter: str) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents may be longer than the default 128 KiB
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"expected {len(reader.fieldnames or [])} fields as in the header of {path}, found another number "
                    f"in line {reader.line_num}; quote texts that hold the delimiter or a line break"
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(
            f"expected {path} to be a table, found in line {reader.reader.line_num}: {error}; double the quotes "
            "inside quoted texts, or use JSON lines"
        ) from error
    return rows


def _parse_json(text: str, path: Path) -> list[Row]:
    """JSON lines, or one JSON array of objects (decided by the first character)."""
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except ValueError as error:
            raise DataError(f"expected a JSON array in {path}, found: {error}; make the file again") from error
        numbered = list(enumerate(rows, start=1))
    else:
        numbered = [
            (number, _parse_line(line, number, path)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise DataError(
                f"expected a JSON object in line (or element) {number} of {path}, found {type(row).__name__}; write "
                'rows as {"column": value, …}'
            )
    return [row for _, row in numbered]


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DataError(
            f"expected one JSON object a line in {path}, found in line {number}: {error}; the file may be truncated"
        ) from error


def _read_dataset(source: str, split: str, config_name: str | None) -> list[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source, config_name, split=split)
        return [dict(row) for row in data]
    except Exception as error:  # the library raises nearly everything: connection, missing split, damaged files …
        raise DataError(
            f"expected {source!r} to be a data file or a data set of the `datasets` library with split {split!r}, "
            f"found: {type(error).__name__}: {error}; check the name, the split and the network, or give a local file"
        ) from error


def find_columns(
    rows: Sequence[Row], asked: Sequence[str] | None, usual: Iterable[Sequence[str]], *, what: str, field: str
) -> tuple[str, ...]:
    """Names of the columns to use: those asked for, else the first of the ``usual`` groups that is there.

    Raises:
        DataError: none is there; lists what was expected and the columns found.
    """
    found = list(rows[0])
    candidates = [tuple(asked)] if asked is not None else [tuple(group) for group in usual]
    for group in candidates:
        if group and all(name in found for name in group):
            return group
    expected = " or ".join(" + ".join(repr(name) for name in group) for group in candidates)
    raise DataError(
        f"expected the {what} in column(s) {expected}, found columns {', '.join(map(repr, found))}; name the right "
        f"ones in data.{field}"
    )


def cell(row: Mapping[str, Any], column: str, kind: type | tuple[type, ...], number: int, what: str) -> Any:
    """The value of a column, checked for its type; ``number`` counts rows from 1 for the message."""
    if column not in row:
        raise DataError(
            f"expected column {column!r} in every row, found row {number} with {', '.join(map(repr, row))} only; "
            "complete or remove that row"
        )
    value = row[column]
    if not isinstance(value, kind):
        raise DataError(
            f"expected {what} in column {column!r}, found {value!r:.80} in row {number}; correct or remove that row"
        )
    return value


def sample_rows(rows: list[Row], count: int | None, seed: int, *, field: str, shuffle: bool) -> list[Row]:
    """``count`` rows drawn without replacement, all for ``None``; in their original order unless ``shuffle``.

    Shuffled rows can be cut into parts that are all fair samples, even where a file is sorted by class or document.

    Raises:
        DataError: there are fewer rows than asked for.
    """
    count = len(rows) if count is None else count
    if count > len(rows):
        raise DataError(
            f"expected at least {count} examples for data.{field}, found {len(rows)}; give more data or lower "
            f"data.{field}"
        )
    drawn = random.Random(seed).sample(range(len(rows)), count)
    return [rows[index] for index in (drawn if shuffle else sorted(drawn))]
