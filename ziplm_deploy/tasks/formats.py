"""Rows from the text of data files: CSV, TSV, JSON lines, JSON arrays, SQuAD's own JSON, and Parquet."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from ziplm_deploy.documents import parse_json
from ziplm_deploy.errors import DataError
from ziplm_deploy.tasks.class_names import with_class_names

_ASKS_QUOTES = set(',"\n\t')  # of a spreadsheet

Row = dict[str, Any]


def parse_parquet(content: bytes) -> list[Row]:
    """Rows of a Parquet file; classes keep the names that `datasets` has left in its metadata.

    Raises:
        ValueError: no Parquet file, or metadata of another form.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(content))
    rows: list[Row] = table.to_pylist()
    if b"huggingface" not in (table.schema.metadata or {}):
        return rows
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(table.schema)
    except Exception as error:  # whatever its parts raise when they are built from other fields
        raise ValueError(
            f"metadata that the `datasets` library cannot read ({type(error).__name__}: {error})"
        ) from error
    return with_class_names(rows, features)


def parse_csv(text: str, path: Path) -> list[Row]:
    """Rows of a table with commas; texts with quotes, commas or line breaks are quoted."""
    return _table(text, path, delimiter=",", quoted=True)


def parse_tsv(text: str, path: Path) -> list[Row]:
    """Rows of a table with tabs, in which a quote is a character like any other, unless a CSV writer has made it.

    Tables of GLUE hold texts with lone quotes; one from a CSV writer is known by what it does to quotes.
    """
    return _table(text, path, delimiter="\t", quoted=_is_of_a_csv_writer(text, path))


def _is_of_a_csv_writer(text: str, path: Path) -> bool:
    if '"' not in text:
        return False
    try:
        rows = _cells(text, delimiter="\t", quoted=True)
    except csv.Error:
        return False
    if any("\t" in cell for row in rows for cell in row):  # rows that a lone quote has glued together
        return False
    lines = _lines(text)
    styles = (_written(rows, csv.QUOTE_MINIMAL), _written(rows, csv.QUOTE_ALL), _written_by_excel(rows))
    return any(lines == _lines(written) for written in styles)


def _lines(text: str) -> list[str]:
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _written(rows: list[list[str]], style: Any) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t", quoting=style, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _written_by_excel(rows: list[list[str]]) -> str:
    """The table with tabs in which cells with commas are quoted, too, as spreadsheets save it."""
    quoted = [
        ['"' + cell.replace('"', '""') + '"' if _ASKS_QUOTES & set(cell) else cell for cell in row] for row in rows
    ]
    return "".join("\t".join(row) + "\n" for row in quoted)


def _cells(text: str, *, delimiter: str, quoted: bool) -> list[list[str]]:
    return [row for row in _reader(text, delimiter, quoted) if row]


def _reader(text: str, delimiter: str, quoted: bool) -> Any:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents may be longer than the default 128 KiB
    style: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=style, strict=quoted)


def _table(text: str, path: Path, *, delimiter: str, quoted: bool) -> list[Row]:
    reader = _reader(text, delimiter, quoted)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"expected {len(header)} fields as in the header of {path}, found {len(cells)} in line "
                    f"{reader.line_num}; {_way_out(delimiter)}"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"expected {path} to be a table, found in line {reader.line_num}: {error}; double the quotes inside quoted "
            "texts, or use JSON lines"
        ) from error
    return rows


def _way_out(delimiter: str) -> str:
    if delimiter == "\t":
        return "quotes mean nothing in a .tsv file: write texts with tabs or line breaks as JSON lines"
    return "quote texts that hold the delimiter or a line break"


def parse_json_rows(text: str, path: Path) -> list[Row]:
    """Rows of JSON lines, of one JSON array, of an object with the rows in ``data``, or of SQuAD's own JSON."""
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_whole(text, path), start=1))
    elif (wrapped := _wrapped(text, path)) is not None:
        numbered = list(enumerate(wrapped, start=1))
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


def _whole(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"expected a JSON array in {path}, found: {error}; make the file again") from error


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DataError(
            f"expected one JSON object a line in {path}, found in line {number}: {error}; the file may be truncated"
        ) from error


def _wrapped(text: str, path: Path) -> list[Any] | None:
    """Rows of a file that is one object as a whole, None for JSON lines.

    Raises:
        DataError: an object of another form, such as one list a column.
    """
    lines = text.strip().split("\n", 1)
    if not _is_one_object(lines):
        return None
    try:
        whole = parse_json(text)
    except ValueError:
        return None  # the line that is wrong is named by the reader of lines
    if not isinstance(whole, dict):
        return None
    data = whole.get("data")
    if isinstance(data, list):
        is_squad = any(isinstance(article, dict) and "paragraphs" in article for article in data)
        return _questions(data, path) if is_squad else data
    if len(lines) == 1:
        return None  # JSON lines with a single line
    raise DataError(
        f'expected rows in {path}, as JSON lines, as an array or as {{"data": […]}}, found one object with '
        f"{', '.join(map(repr, list(whole)[:5]))}; write one object a row"
    )


def _is_one_object(lines: list[str]) -> bool:
    """Whether a text can be one object: its first line is all there is, or is not whole."""
    if len(lines) == 1:
        return True
    try:
        parse_json(lines[0])
    except ValueError:
        return True
    return False


def _questions(articles: list[Any], path: Path) -> list[Row]:
    """Rows of the Hugging Face form of SQuAD from the nested form in which it is published."""
    try:
        return [
            {
                "id": question["id"],
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    "text": [answer["text"] for answer in question.get("answers", [])],
                    "answer_start": [answer["answer_start"] for answer in question.get("answers", [])],
                },
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"expected SQuAD's JSON (data, paragraphs, qas, answers) in {path}, found one without {error}; write rows "
            "with question, context and answers as JSON lines"
        ) from error
