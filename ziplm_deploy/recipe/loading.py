"""Recipes from YAML or mappings, and what is wrong with one, field by field.

``ziplm-deploy recipe-reference`` prints the table of the guide ``recipe`` from the fields' descriptions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe.recipe import Recipe

RENAMED = {
    "environment.batch_size": "environment.workload.batch_size",
    "environment.seq_len": "environment.workload.seq_len",
}


def load_recipe(path: Path | str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe; relative data and model paths are taken from the recipe's folder if they exist there.

    Raises:
        RecipeError: the file is missing, no YAML mapping, or a field is wrong; names field and valid choices.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"expected a recipe at {path}, found no file; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    for section, keys in (
        ("model", ("path",)),
        ("data", ("calibration", "evaluation", "train")),
        ("recover", ("teacher",)),
        ("profile", ("table",)),
    ):
        fields = raw.get(section)
        if not isinstance(fields, dict):
            continue
        raw[section] = fields = dict(fields)
        for key in keys:
            value = fields.get(key)
            if isinstance(value, str) and (folder / value).exists():
                fields[key] = str((folder / value).resolve())


def _explain(error: ValidationError, source: str) -> str:
    items = error.errors()
    # A list with a wrong item is called too short, too, as if the item were not there.
    inner = {item["loc"][:-1] for item in items}
    items = [item for item in items if not (item["type"] == "too_short" and item["loc"] in inner)]
    lines = [f"{source}: {len(items)} field(s) are wrong:"]
    for item in items:
        location = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"  {location}: {_unknown(location, item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"  {location}: required, but missing")
        elif item["type"] == "value_error":  # a rule over several fields: its message says what was found
            lines.append(f"  {location or 'recipe'}: {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {location}: {item['msg']}, found {item['input']!r}")
    return "\n".join(lines)


def _unknown(location: str, path: tuple[int | str, ...]) -> str:
    if location in RENAMED:
        return f"renamed, write {RENAMED[location]}"
    return f"unknown field; valid here: {', '.join(_siblings(path))}"


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return sorted(section.model_fields)
