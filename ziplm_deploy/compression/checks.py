"""Whether a run's compression can work, found out before any long work."""

from __future__ import annotations

from ziplm_deploy.config import Recipe
from ziplm_deploy.errors import UsageError
from ziplm_deploy.side import NEURAL_COMPRESSOR


def check_compression(recipe: Recipe) -> None:
    """Refuse settings of ``compress`` that cannot work here.

    Raises:
        EngineError: neural-compressor is not set up, or of another version; says which command brings it.
        UsageError: a task whose inputs compression cannot calibrate on.
    """
    if recipe.compress.makes_int8 and recipe.compress.int8.backend == "neural-compressor":
        NEURAL_COMPRESSOR.check()
    if recipe.compress.variants and recipe.data.calibration is None:
        raise UsageError("expected data.calibration for compress.variants, found none; give a data file")
