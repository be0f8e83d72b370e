"""Guides and ready recipes that are shipped with the package: ``ziplm-deploy guide NAME``, ``ziplm-deploy new NAME``.

Guides are ``*.md`` beside this file, those in a folder are named with it, such as ``extending/method``. Recipes are
``recipes/*.yaml``. Imports nothing heavy.
"""

from __future__ import annotations

import re
from pathlib import Path

from ziplm_deploy.errors import UsageError

__all__ = ["first_sentence", "guide_names", "read_guide", "recipe_names", "recipe_text"]

_FOLDER = Path(__file__).parent
_RECIPES = _FOLDER / "recipes"
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)


def guide_names() -> list[str]:
    """Names of all guides, sorted."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.md"))


def read_guide(name: str) -> str:
    """Markdown text of a guide.

    Raises:
        UsageError: there is no such guide; lists those that there are.
    """
    return _read(name, guide_names(), _FOLDER / f"{name}.md", "guide")


def first_sentence(name: str) -> str:
    """The sentence that says what a guide is about: the first after its title, on one line.

    Raises:
        UsageError: there is no such guide.
    """
    lines = read_guide(name).splitlines()
    body = "\n".join(line for line in lines if not line.startswith(("# ", "<!--"))).strip()
    paragraph = " ".join(body.split("\n\n")[0].split())
    found = _SENTENCE.match(paragraph)
    return found[0] if found else paragraph


def recipe_names() -> list[str]:
    """Names of all ready recipes, sorted."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """YAML text of a ready recipe, with its comments.

    Raises:
        UsageError: there is no such recipe; lists those that there are.
    """
    return _read(name, recipe_names(), _RECIPES / f"{name}.yaml", "recipe")


def _read(name: str, known: list[str], path: Path, what: str) -> str:
    if name not in known:  # checked by name, so that no path leads out of the folder
        raise UsageError(f"expected a {what} of {', '.join(known)}, found {name!r}; name one of them")
    return path.read_text(encoding="utf-8")
