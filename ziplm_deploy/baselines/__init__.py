"""What users get from the dense model without pruning, made by the usual tools: one page each.

``onnxruntime_int8.py`` is ``onnxruntime-int8`` of ``benchmark.baselines``.
"""

from __future__ import annotations

import importlib

from ziplm_deploy.baselines.base import Baseline, BaselineRecord, BaselineScores, DenseSource
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe.choices import page_names

__all__ = ["BASELINES", "Baseline", "BaselineRecord", "BaselineScores", "DenseSource", "get_baseline"]

BASELINES: tuple[str, ...] = page_names("baselines")


def get_baseline(name: str) -> Baseline:
    """The baseline called ``name``.

    Raises:
        RecipeError: no such baseline; lists those there are.
    """
    if name not in BASELINES:
        raise RecipeError(f"expected a baseline of {', '.join(BASELINES)}, found {name!r}; correct benchmark.baselines")
    baseline = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").BASELINE
    assert isinstance(baseline, Baseline)
    return baseline
