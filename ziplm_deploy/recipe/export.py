"""The section ``export``: form of the ONNX files, and files for other runtimes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziplm_deploy.recipe.base import Frozen

GgufType = Literal["F16", "Q8_0", "Q4_0"]  # of weights


class ExportConfig(Frozen):
    """Form of the ONNX files, and files for other runtimes."""

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
    gguf: GgufType | None = Field(
        None,
        exclude_if=lambda kind: kind is None,
        description="Text-generation: also write `model.gguf` with weights of this type, for llama.cpp; models of the "
        "Llama kind only. `benchmark.engines: [llamacpp]` measures it. With `environment.engine: llamacpp` it is the "
        "file that serves, in place of ONNX files.",
    )
    genai: bool = Field(
        False,
        exclude_if=lambda asked: not asked,
        description="Text-generation: also write `genai_config.json`, with which onnxruntime-genai loads the folder.",
    )
    stock_optimum: bool = Field(
        False,
        exclude_if=lambda asked: not asked,
        description="Text-generation: files that stock `ORTModelForCausalLM` loads also where layers keep different "
        "numbers of heads, for some microseconds a layer; not together with `genai`.",
    )
    embed_in_graph: bool = Field(
        True,
        description="Sentence-similarity: add pooling, Dense layers and normalization as output `sentence_embedding`.",
    )

    @property
    def of_onnx(self) -> ExportConfig:
        """These settings without those of other files."""
        return self.model_copy(update={"gguf": None, "genai": False})
