"""ONNX Runtime on the CPU: the default engine."""

from __future__ import annotations

import importlib.metadata

from ziplm_deploy.engines.base import Engine
from ziplm_deploy.errors import EngineError


class OnnxRuntimeEngine(Engine):
    """Intra-op threads as asked, no spinning, otherwise a default session."""

    name = "onnxruntime"

    def version(self) -> str:
        try:
            return importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            raise EngineError(
                "expected the engine onnxruntime, found it not installed; run: pip install onnxruntime"
            ) from None
