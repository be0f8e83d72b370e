"""Reading rows: CSV, TSV, JSON, JSON lines, Parquet and plain text files (``.gz`` allowed), or a `datasets` name.

Local files are read directly: nothing is cached, nothing touches the network, and a damaged line is named by its
number. The `datasets` library is asked only for folders and for names that are no file.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ziplm_deploy.documents import shortened
from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.class_names import with_class_names
from ziplm_deploy.tasks.formats import Row, parse_csv, parse_json_rows, parse_parquet, parse_tsv
from ziplm_deploy.tasks.nested import parse_nested

__all__ = ["SUFFIXES", "Row", "cell", "find_columns", "read_rows", "read_text", "sample_rows"]

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # what `Dataset.save_to_disk` leaves in a folder
MIN_UNPACKED_BYTES, MAX_GZIP_RATIO = 64 << 20, 100  # texts shrink to a third or a tenth
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")


def read_rows(source: str, *, split: str, config_name: str | None = None, revision: str | None = None) -> list[Row]:
    """Rows of a local file, or of a `datasets` folder or name (there ``revision`` is a commit or tag of the hub).

    Raises:
        DataError: the source is missing, damaged, of an unknown format or has no rows.
    """
    path = Path(source)
    if os.path.isfile(path):  # as below: False for a name too long for any file
        rows = _read_file(path)
    elif os.path.isdir(path) or not _looks_like_path(source):
        rows = _read_dataset(source, split, config_name, revision)
    else:
        raise DataError(
            f"expected a data file at {source}, found none; check the path (relative paths are taken from the recipe's "
            "folder, then from the current one)"
        )
    if not rows:
        raise DataError(f"expected rows in {source}, found an empty data set; give a file with at least one example")
    return rows


def read_text(source: str) -> str | None:
    """The text of a plain text file, every character as it is; None for a source that is none.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(source)
    if not os.path.isfile(path) or _suffix(path) != ".txt":
        return None
    with _readable(path):
        return _content(path).decode("utf-8-sig")


def _looks_like_path(source: str) -> bool:
    name = source.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES) or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1


def _read_file(path: Path) -> list[Row]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"expected a data file of type {', '.join(SUFFIXES)} (each also as .gz), found {path.name}; convert it"
        )
    with _readable(path):
        content = _content(path)
        if suffix == ".parquet":
            return parse_parquet(content)
        text = content.decode("utf-8-sig")
    if suffix == ".txt":
        return [{"text": line.strip()} for line in text.split("\n") if line.strip()]
    parse = {".csv": parse_csv, ".tsv": parse_tsv}.get(suffix, parse_json_rows)
    return parse(text, path)


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into a :class:`DataError` that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's errors are ValueErrors, too
        raise DataError(
            f"expected a readable {_suffix(path)} file in {path}, found: {error}; make the file again"
        ) from error


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return _unpacked(content) if path.name.lower().endswith(".gz") else content


def _unpacked(content: bytes) -> bytes:
    """The content of a gzip file; raises ``ValueError`` for one of nothing but repetition, made to fill memory."""
    limit = MIN_UNPACKED_BYTES + MAX_GZIP_RATIO * len(content)
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        unpacked = stream.read(limit + 1)
    if len(unpacked) > limit:
        raise ValueError(f"more than {MAX_GZIP_RATIO} times its size unpacked")
    return unpacked


def _read_dataset(source: str, split: str, config_name: str | None, revision: str | None) -> list[Row]:
    import datasets

    try:
        if Path(source).is_dir() and any((Path(source) / name).is_file() for name in _SAVED_TO_DISK):
            saved = datasets.load_from_disk(source)
            data = saved[split] if isinstance(saved, dict) else saved
        else:
            options = _without_code(datasets.__version__) | ({} if revision is None else {"revision": revision})
            data = datasets.load_dataset(source, config_name, split=split, **options)
        return with_class_names([dict(row) for row in data], getattr(data, "features", None))
    except Exception as error:  # the library raises nearly everything: connection, missing split, damaged files …
        raise DataError(
            f"expected {source!r} to be a data file or a data set of the `datasets` library with split {split!r}, "
            f"found: {type(error).__name__}: {shortened(str(error))}; check the name, the split and the network, or "
            "give a local file"
        ) from error


def _without_code(version: str) -> dict[str, Any]:
    """Keywords with which `datasets` runs no script of a data set; from 4.0 on it has forgotten how to."""
    return {"trust_remote_code": False} if int(version.split(".")[0]) < 4 else {}


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
    if isinstance(value, str) and kind in (list, (list,)):
        value = parse_nested(value, column, number)
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
            f"expected at least {count} examples for data.{field}, found {len(rows)}; give more data, or lower "
            f"data.{field} where the recipe names it"
        )
    drawn = random.Random(seed).sample(range(len(rows)), count)
    return [rows[index] for index in (drawn if shuffle else sorted(drawn))]
