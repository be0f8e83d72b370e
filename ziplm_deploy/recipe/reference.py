"""The table of all recipe fields, from the fields' own descriptions."""

from __future__ import annotations

from pydantic import BaseModel

from ziplm_deploy.recipe.base import section_of
from ziplm_deploy.recipe.recipe import Recipe


def recipe_reference() -> str:
    """Markdown table of every recipe field: name, type, default, meaning."""
    rows = ["| field | default | meaning |", "|---|---|---|"]

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            if inner is None or inner is not field.annotation:  # a section that may be left out has a row of its own
                default = "required" if field.is_required() else f"`{field.get_default()}`"
                rows.append(f"| `{prefix}{name}` | {default} | {field.description} |")
            if inner is not None:
                walk(inner, f"{prefix}{name}.")

    walk(Recipe, "")
    return "\n".join(rows)
