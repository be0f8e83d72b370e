"""What a run and its readers survive: ``python benchmarks/robustness.py [--only kills|fuzz]``.

``kills``: runs that are killed at random moments and resumed, and pairs of runs in one folder
(:mod:`robustness_kills`). ``fuzz``: damaged files of every kind that may come from anywhere (:mod:`robustness_fuzz`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import robustness_fuzz
import robustness_kills
from common import Figure, write_result

PARTS = {"kills": robustness_kills, "fuzz": robustness_fuzz}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    for part in PARTS.values():
        part.add_arguments(parser)
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    for name, part in PARTS.items():
        if options.only in (None, name):
            found, its_rows = part.measure(options)
            figures |= found
            rows += its_rows
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write_result("robustness", figures, rows, settings, options.output)
    return int(any(figure.met is False for figure in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
