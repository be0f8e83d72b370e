"""ONNX Runtime on the CPU: the default engine."""

from __future__ import annotations

import importlib.metadata

from ziplm_deploy.engines.base import Engine
from ziplm_deploy.errors import EngineError


class OnnxRuntimeEngine(Engine):
    """Intra-op threads as asked, no spinning, all graph optimisations but those that cost time."""

    name = "onnxruntime"

    def version(self) -> str:
        try:
            return importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            raise EngineError(
                "expected the engine onnxruntime, found it not installed; run: pip install onnxruntime"
            ) from None

    def disabled_optimizers(self, shapes: str) -> tuple[str, ...]:
        # The SkipLayerNormalization CPU kernel takes several times as long as Add + LayerNormalization and made dense
        # BERT-base 10 % slower. The fusion needs constant shapes, so only static exports are hit.
        return ("SkipLayerNormFusion",) if shapes == "static" else ()
