"""The dimensions of a model, without torch: what tables are measured for and plans are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

ModuleKind = Literal["attention", "ffn"]


class ModelShape(BaseModel):
    """The dimensions that decide what a cell costs."""

    model_type: str
    n_layers: int
    hidden_size: int
    n_heads: int
    head_dim: int
    intermediate_size: int
