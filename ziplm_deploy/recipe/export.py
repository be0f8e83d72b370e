"""The section ``export``: form of the ONNX files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziplm_deploy.recipe.base import Frozen


class ExportConfig(Frozen):
    shapes: Literal["dynamic", "static"] = Field(
        "dynamic", description="`dynamic` accepts any batch and length; `static` fixes those of the environment."
    )
    opset: int = Field(17, ge=14, le=20, description="ONNX opset; 17 is the first with LayerNormalization.")
    embed_in_graph: bool = Field(
        True,
        description="Sentence-similarity: add pooling, Dense layers and normalization as output `sentence_embedding`.",
    )
