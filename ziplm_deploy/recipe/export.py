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
    cache_form: Literal["onnxruntime", "portable"] | None = Field(
        None,
        exclude_if=lambda form: form is None,
        description="Text-generation: `onnxruntime` files have fused attention and a cache in place, and run fastest "
        "there; `portable` ones have standard operators only. Default: the first for ONNX Runtime.",
    )
    embed_in_graph: bool = Field(
        True,
        description="Sentence-similarity: add pooling, Dense layers and normalization as output `sentence_embedding`.",
    )
