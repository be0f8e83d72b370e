"""Inference engines: one small file each, and ``worker.py``, which runs them in a process of their own."""

from __future__ import annotations

from ziplm_deploy.engines.base import TURN_WARMUP_MS, Engine, ModelSignature, TensorInfo, WorkerHandle, WorkerOptions
from ziplm_deploy.engines.deepsparse import DeepSparseEngine
from ziplm_deploy.engines.onnxruntime import OnnxRuntimeEngine
from ziplm_deploy.engines.openvino import OpenVinoEngine
from ziplm_deploy.errors import EngineError

__all__ = [
    "ENGINES",
    "TURN_WARMUP_MS",
    "Engine",
    "ModelSignature",
    "TensorInfo",
    "WorkerHandle",
    "WorkerOptions",
    "get_engine",
]

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (OnnxRuntimeEngine, OpenVinoEngine, DeepSparseEngine)
}


def get_engine(name: str) -> Engine:
    """The engine called ``name``; raises EngineError naming the known ones."""
    if name not in ENGINES:
        raise EngineError(f"expected one of the engines {', '.join(sorted(ENGINES))}, found {name!r}")
    return ENGINES[name]()
