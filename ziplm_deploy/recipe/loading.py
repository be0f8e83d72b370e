"""Recipes from YAML or mappings, and what is wrong with one, field by field.

``ziplm-deploy recipe-reference`` prints the table of the guide ``recipe`` from the fields' descriptions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ziplm_deploy.documents import MAX_SHOWN, read_yaml, shortened, shown
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe.base import section_of
from ziplm_deploy.recipe.recipe import Recipe

RENAMED = {
    "environment.batch_size": "environment.workload.batch_size",
    "environment.seq_len": "environment.workload.seq_len",
}
PATHS = {  # sections and their fields with paths, which are taken from the recipe's folder if they exist there
    "model": ("path",),
    "data": ("calibration", "evaluation", "train", "retrieval"),
    "environment.workload": ("lengths",),
    "recover": ("teacher",),
    "profile": ("table",),
}
MAX_ITEMS = 40  # wrong fields that a message lists


def load_recipe(path: Path | str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe; relative data and model paths are taken from the recipe's folder if they exist there.

    Raises:
        RecipeError: the file is missing, no YAML mapping, or a field is wrong; names field and valid choices.
    """
    path = Path(path)
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError(f"expected a recipe at {path}, found no file; check the path") from None
    except ValueError as error:
        raise RecipeError(f"expected YAML in {path}, found: {error}; see: ziplm-deploy guide recipe") from error
    except OSError as error:
        raise RecipeError(f"expected a readable recipe at {path}, found: {error}; check the path") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"expected a mapping of recipe fields in {path}, found {type(raw).__name__}; see: ziplm-deploy guide recipe"
        )
    raw = {**raw, **(overrides or {})}
    _resolve_paths(raw, path.parent)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping as a :class:`Recipe`; raises :class:`RecipeError` naming every wrong field."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, source)) from None


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    for section, keys in PATHS.items():
        fields: Any = raw
        for name in section.split("."):
            if not isinstance(fields.get(name), dict):
                break
            fields[name] = fields = dict(fields[name])
        else:
            _resolve_keys(fields, keys, folder)


def _resolve_keys(fields: dict[str, Any], keys: tuple[str, ...], folder: Path) -> None:
    for key in keys:
        value = fields.get(key)
        if isinstance(value, str) and os.path.exists(folder / value):  # False for a name too long for any file
            fields[key] = str((folder / value).resolve())


def _explain(error: ValidationError, source: str) -> str:
    items = error.errors()
    # A list with a wrong item is called too short, too, as if the item were not there.
    inner = {item["loc"][:-1] for item in items}
    items = [item for item in items if not (item["type"] == "too_short" and item["loc"] in inner)]
    lines = [f"{source}: {len(items)} field(s) are wrong:", *map(_line, items[:MAX_ITEMS])]
    if len(items) > MAX_ITEMS:
        lines.append(f"  and {len(items) - MAX_ITEMS} more")
    return "\n".join(lines)


def _line(item: ErrorDetails) -> str:
    """What is wrong with one field; no longer than a few lines, however much stands in it."""
    location = shortened(".".join(str(part) for part in item["loc"]), MAX_SHOWN)
    if item["type"] == "extra_forbidden":
        return f"  {location}: {_unknown(location, item['loc'])}"
    if item["type"] == "missing":
        return f"  {location}: required, but missing"
    if item["type"] == "value_error":  # a rule over several fields: its message says what was found
        return f"  {location or 'recipe'}: {shortened(item['msg'].removeprefix('Value error, '))}"
    return f"  {location}: {shortened(item['msg'])}, found {shown(item['input'])}"


def _unknown(location: str, path: tuple[int | str, ...]) -> str:
    if location in RENAMED:
        return f"renamed, write {RENAMED[location]}"
    return f"unknown field; valid here: {', '.join(_siblings(path))}"


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        section = section_of(section.model_fields[str(part)].annotation) or section
    return sorted(section.model_fields)
