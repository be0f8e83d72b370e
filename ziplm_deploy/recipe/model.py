"""The section ``model``: which model, and what it does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziplm_deploy.recipe.base import Frozen

TaskName = Literal[
    "sentence-similarity",
    "text-classification",
    "multi-label-classification",
    "text-regression",
    "question-answering",
    "token-classification",
    "fill-mask",
    "image-classification",
]


class ModelConfig(Frozen):
    path: str = Field(
        description="Local folder, hub id, or `package:NAME` for a model that an installed Python package ships."
    )
    task: TaskName = Field(description="What the model does; decides head, data columns, metric and ONNX outputs.")
    revision: str | None = Field(None, description="Hub revision; only used with a hub id.")
    pooling: Literal["mean", "cls"] = Field(
        "mean", description="How sentence-similarity models turn token vectors into one embedding."
    )
    normalize: bool = Field(True, description="Scale embeddings to length 1 (sentence-similarity).")
