"""Inference engines: one page each in ``worker/``, whose files run in a process of their own."""

from __future__ import annotations

import importlib

from ziplm_deploy.engines.base import (
    TURN_WARMUP_MS,
    Engine,
    ModelSignature,
    TensorInfo,
    Timed,
    WorkerHandle,
    WorkerOptions,
)
from ziplm_deploy.engines.worker.facts import CHECKPOINT, page_of
from ziplm_deploy.errors import EngineError
from ziplm_deploy.recipe.choices import page_names

__all__ = [
    "CHECKPOINT_ENGINES",
    "ENGINES",
    "TURN_WARMUP_MS",
    "Engine",
    "ModelSignature",
    "TensorInfo",
    "Timed",
    "WorkerHandle",
    "WorkerOptions",
    "get_engine",
]

ENGINES: tuple[str, ...] = page_names("engines", "worker", suffix="_session")
CHECKPOINT_ENGINES: tuple[str, ...] = page_names("engines", "worker", suffix=CHECKPOINT)  # they run no ONNX files


def get_engine(name: str) -> Engine:
    """The engine called ``name``; raises EngineError naming the known ones."""
    if name not in (*ENGINES, *CHECKPOINT_ENGINES):
        raise EngineError(
            f"expected one of the engines {', '.join(ENGINES)}, found {name!r}; correct the engine's name"
        )
    page = importlib.import_module(f"{__name__}.worker.{page_of(name)}")
    return Engine(name, page.FACTS)
