"""The section ``profile``: how the latency table is measured."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ziplm_deploy.recipe.base import Frozen


class ProfileConfig(Frozen):
    table: Path | None = Field(None, description="Use this latency table instead of measuring one.")
    allow_foreign_table: bool = Field(
        False, description="Accept a table of another machine or engine version; predictions may then be far off."
    )
    stack_depth: int = Field(4, ge=1, le=32, description="Identical sub-blocks a cell; 1 is biased by warm caches.")
    stack_megabytes: float | None = Field(
        None,
        ge=0,
        exclude_if=lambda megabytes: megabytes is None,
        description="Text-generation: megabytes of weights in a cell, for a decode call reads them all. Default: three "
        "times the last-level cache, at most those of the model.",
    )
    width_ratio: float = Field(0.9, gt=0.3, le=0.97, description="FFN widths shrink by this factor a level.")
    width_align: int = Field(
        8,
        ge=1,
        description="FFN widths are multiples of this: one AVX register of floats. In llama.cpp of 32, too, the values "
        "of a block.",
    )
    min_rounds: int = Field(15, ge=3, description="Interleaved rounds before any cell may be called stable.")
    max_rounds: int = Field(120, ge=3, description="Interleaved rounds after which measuring stops.")
    precision: float = Field(
        0.01, gt=0, lt=0.5, description="Stop when every cell's standard error of the median is below this fraction."
    )
    max_seconds: float = Field(180.0, gt=0, description="Time limit of the measuring loop (export not included).")
