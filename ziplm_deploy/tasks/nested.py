"""Lists and mappings that a table holds as text: JSON, or what Python and numpy print."""

from __future__ import annotations

import ast
import io
import tokenize
from typing import Any

from ziplm_deploy.documents import parse_json
from ziplm_deploy.errors import DataError

_VALUES = (tokenize.STRING, tokenize.NUMBER)


def parse_nested(text: str, column: str, number: int) -> Any:
    """The list or mapping that a cell of a table prints; ``number`` is the row's, from 1.

    Understands JSON, and lists, mappings and arrays of strings and numbers as ``Dataset.to_csv`` and pandas leave them.

    Raises:
        DataError: anything else; names the column and the formats that keep it.
    """
    try:
        return parse_json(text)
    except ValueError:
        pass
    try:
        return _literal(ast.parse(_with_commas(text.strip()), mode="eval").body)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise DataError(
            f"expected a list or mapping in column {column!r}, found {text!r:.80} in row {number}: tables keep no "
            "nested columns; write the data as JSON lines (Dataset.to_json) or Parquet (Dataset.to_parquet)"
        ) from error


def _with_commas(text: str) -> str:
    """The text with commas between values that only a space separates, as numpy prints them.

    Python would read such strings as one; it never prints two values without a comma itself.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    # Line breaks inside brackets are tokens of their own between two values.
    kept = [token for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)]
    parts: list[str] = []
    for before, token in zip([None, *kept], kept, strict=False):
        if before is not None and before.type in _VALUES and token.type in _VALUES:
            parts.append(",")
        parts.append(token.string)
    return " ".join(parts)


def _literal(node: ast.expr) -> Any:
    """Value of a node that is made of lists, mappings, strings, numbers and ``array([…])`` only."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float))):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        pairs = zip(node.keys, node.values, strict=True)
        return {_literal(key): _literal(value) for key, value in pairs if key is not None}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -_literal(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "array" and node.args:
        return _literal(node.args[0])
    raise ValueError(f"expected a literal, found {type(node).__name__}")
