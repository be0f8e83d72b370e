"""Small images for the tiny models, made here: each class has a colour, each image noise of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.search_data import write_lines

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}


def image_rows(folder: Path, count: int, *, seed: int = 0, size: tuple[int, int] = (20, 24)) -> list[dict[str, Any]]:
    """Write images into ``folder`` and give rows ``{"image": name, "label": colour, "caption": text}``."""
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        pixels = np.array(COLOURS[colour]) + generator.normal(0, 60, (*size, 3))
        name = f"{seed}-{number}.png"
        image_module.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        words = " ".join(generator.choice(["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "tree"], 5))
        rows.append({"image": name, "label": colour, "caption": f"{words} {number % 7}"})
    return rows


def write_image_rows(path: Path, count: int, *, seed: int = 0, columns: tuple[str, ...] = ("image", "label")) -> str:
    """Write images beside a file of JSON lines with these columns of their rows; returns the path of the file."""
    rows = image_rows(path.parent, count, seed=seed)
    return write_lines(path, [{name: row[name] for name in columns} for row in rows])
