"""Members in lm-evaluation-harness: zero-shot choices and its other tasks, on the ONNX file that will serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ziplm_deploy.errors import UsageError

if TYPE_CHECKING:
    from ziplm_deploy.engines.harness_model import HarnessModel


def load_harness_model(folder: Path | str, file: str = "model.onnx") -> HarnessModel:
    """Open a member of a causal language model for ``lm_eval.simple_evaluate``; as :class:`HarnessModel`.

    Raises:
        UsageError: the package lm-eval is not installed.
    """
    try:
        from ziplm_deploy.engines.harness_model import HarnessModel
    except ModuleNotFoundError as error:
        raise UsageError(
            f'expected the package lm-eval, found no {error.name}; run: pip install "ziplm-deploy[lm-eval]"'
        ) from error
    return HarnessModel(folder, file)
