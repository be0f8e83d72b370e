"""OpenVINO on the CPU: a third opinion, in the extra ``openvino``."""

from __future__ import annotations

import importlib.metadata

from ziplm_deploy.engines.base import Engine
from ziplm_deploy.errors import EngineError


class OpenVinoEngine(Engine):
    """One stream, threads as asked, float32 arithmetic: by default it would compute in bfloat16 where the CPU can."""

    name = "openvino"

    def version(self) -> str:
        try:
            return importlib.metadata.version("openvino")
        except importlib.metadata.PackageNotFoundError:
            raise EngineError(
                'expected the engine openvino, found it not installed; run: pip install "ziplm-deploy[openvino]"'
            ) from None
