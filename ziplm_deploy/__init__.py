"""Prune a Transformer to measured speedups on this CPU and export the family as ONNX.

Everything in ``__all__`` is imported when it is first asked for: importing the package loads no torch and no engine.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

if TYPE_CHECKING:
    from ziplm_deploy.api import benchmark, compress, export, profile, prune, recover, report, run_recipe
    from ziplm_deploy.engines.generation_model import load_generation_model
    from ziplm_deploy.engines.generator import load_runner
    from ziplm_deploy.engines.harness import load_harness_model
    from ziplm_deploy.errors import ZipLMError
    from ziplm_deploy.latency.benchmark import TimedFile, compare
    from ziplm_deploy.latency.record import BenchmarkRecord
    from ziplm_deploy.latency.table import LatencyTable
    from ziplm_deploy.machine.info import machine_info
    from ziplm_deploy.models.inspection import inspect_model
    from ziplm_deploy.models.member_files import load
    from ziplm_deploy.pruning.plan import PruningPlan
    from ziplm_deploy.recipe import Recipe, load_recipe
    from ziplm_deploy.recovery.record import TrainingRecord
    from ziplm_deploy.reporting.records import FamilyReport
    from ziplm_deploy.reporting.tower_pairs import TowerPairs, pair_towers

__all__ = [
    "BenchmarkRecord",
    "FamilyReport",
    "LatencyTable",
    "PruningPlan",
    "Recipe",
    "TimedFile",
    "TowerPairs",
    "TrainingRecord",
    "ZipLMError",
    "benchmark",
    "compare",
    "compress",
    "export",
    "inspect_model",
    "load",
    "load_generation_model",
    "load_harness_model",
    "load_recipe",
    "load_runner",
    "machine_info",
    "pair_towers",
    "profile",
    "prune",
    "recover",
    "report",
    "run_recipe",
]
__version__ = "0.2.0.dev0"

_HOMES = {
    "api": ("benchmark", "compress", "export", "profile", "prune", "recover", "report", "run_recipe"),
    "engines.generation_model": ("load_generation_model",),
    "engines.generator": ("load_runner",),
    "engines.harness": ("load_harness_model",),
    "errors": ("ZipLMError",),
    "latency.benchmark": ("TimedFile", "compare"),
    "latency.record": ("BenchmarkRecord",),
    "latency.table": ("LatencyTable",),
    "machine.info": ("machine_info",),
    "models.inspection": ("inspect_model",),
    "models.member_files": ("load",),
    "pruning.plan": ("PruningPlan",),
    "recipe": ("Recipe", "load_recipe"),
    "recovery.record": ("TrainingRecord",),
    "reporting.records": ("FamilyReport",),
    "reporting.tower_pairs": ("TowerPairs", "pair_towers"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
