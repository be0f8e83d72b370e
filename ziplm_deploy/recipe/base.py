"""What all sections of a recipe have in common."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, field_validator

MAX_TEXT = 4096  # characters of a name or a path: PATH_MAX of Linux
# The largest seed that numpy takes, and more examples, steps, seconds or GiB than anybody has. Beyond it, sizes in
# bytes overflow the 64-bit integers of the libraries below.
MAX_NUMBER = 2**32 - 1


class Frozen(BaseModel):
    """Base of all recipe sections: immutable; unknown keys, NaN, infinity, huge numbers and huge texts are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _not_beyond_reason(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and value > MAX_NUMBER:
            raise ValueError(f"expected a number up to {MAX_NUMBER}, found a larger one; write what you need")
        if isinstance(value, (str, PurePath)) and (len(str(value)) > MAX_TEXT or "\0" in str(value)):
            raise ValueError(f"expected up to {MAX_TEXT} characters and no NUL, found others; correct the text")
        return value


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type is, also where it may be left out; None for other fields."""
    choices = [choice for choice in get_args(annotation) or (annotation,) if choice is not type(None)]
    is_section = len(choices) == 1 and isinstance(choices[0], type) and issubclass(choices[0], BaseModel)
    return choices[0] if is_section else None
