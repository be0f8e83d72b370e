"""The table of all recipe fields, from the fields' own descriptions."""

from __future__ import annotations

from pydantic import BaseModel

from ziplm_deploy.recipe.recipe import Recipe


def recipe_reference() -> str:
    """Markdown table of every recipe field: name, type, default, meaning."""
    rows = ["| field | default | meaning |", "|---|---|---|"]

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                walk(annotation, f"{prefix}{name}.")
                continue
            default = "required" if field.is_required() else f"`{field.get_default()}`"
            rows.append(f"| `{prefix}{name}` | {default} | {field.description} |")

    walk(Recipe, "")
    return "\n".join(rows)
