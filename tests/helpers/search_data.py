"""Data sets of rankings for the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.models import sentences


def ranked_rows(n_queries: int = 6, n_passages: int = 4) -> list[dict[str, Any]]:
    """Queries with passages of which one is relevant, now here, now there."""
    queries, passages = sentences(n_queries, 1), sentences(n_queries * n_passages, 2)
    return [
        {"query": query, "passage": passages[n_passages * number + k], "label": int(k == number % n_passages)}
        for number, query in enumerate(queries)
        for k in range(n_passages)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
