"""Whether a run's compression can work, found out before any long work."""

from __future__ import annotations

from ziplm_deploy.machine.side_environments import NEURAL_COMPRESSOR
from ziplm_deploy.recipe import Recipe


def check_compression(recipe: Recipe) -> None:
    """Refuse settings of ``compress`` that cannot work here.

    Raises:
        EngineError: neural-compressor is not set up, or of another version; says which command brings it.
    """
    if recipe.compress.makes_int8 and recipe.compress.int8.backend == "neural-compressor":
        NEURAL_COMPRESSOR.check()
