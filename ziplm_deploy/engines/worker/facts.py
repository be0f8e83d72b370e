"""What is known about an engine before it is imported."""

from __future__ import annotations

import os
from typing import NamedTuple

CHECKPOINT = "_checkpoint"  # ends the page of what runs checkpoints of transformers, and no ONNX files


def page_of(engine: str) -> str:
    """Name of the module in this folder that is an engine's page: ``my-engine`` has ``my_engine_session.py``."""
    page = engine.replace("-", "_") + CHECKPOINT
    has_one = os.path.exists(os.path.join(os.path.dirname(__file__), page + ".py"))
    return page if has_one else engine.replace("-", "_") + "_session"


class EngineFacts(NamedTuple):
    """Facts of one engine; the defaults are those of a package that lives beside the others."""

    distribution: str  # name of the installed package, whose version is the engine's
    install: str = ""  # command that brings it
    may_abort: bool = False  # whether a model that it cannot run may end its process
    needs_one_of: tuple[str, ...] = ()  # instruction sets; empty: any CPU
    imports: tuple[str, ...] = ()  # what a worker may import before it is bound to its CPUs, beside other workers
    has_own_environment: bool = False  # made by ``ziplm-deploy setup NAME``, because its packages do not fit here
