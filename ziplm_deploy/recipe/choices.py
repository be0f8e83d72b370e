"""Choices of recipe fields whose values are pages: a page more in its folder is a choice more."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def page_names(*folder: str, suffix: str = "") -> tuple[str, ...]:
    """Names of the pages in a folder of this package, sorted; ``layer_drop.py`` is called ``layer-drop``.

    ``suffix``: what the names of the pages end with, and those of other files in the folder do not. Nothing is
    imported: recipes are read before torch and engines are.
    """
    stems = [path.stem for path in PACKAGE.joinpath(*folder).glob(f"*{suffix}.py") if not path.stem.startswith("_")]
    return tuple(sorted(stem.removesuffix(suffix).replace("_", "-") for stem in stems if stem != "base"))
