"""How sure the scores of a family are, as the evaluation leaves it for reports."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.tasks.resampling import Comparison


class FileUncertainty(BaseModel):
    """Intervals of one ONNX file's scores, and its scores beside those of other files on the same examples."""

    outcomes_hash: str  # of the outcomes that this was computed from
    intervals: dict[str, tuple[float, float]]  # 95 %, by metric
    of_dense: dict[str, Comparison] = Field(default_factory=dict)  # by metric; empty for the dense file itself
    of_source: Comparison | None = None  # primary metric of an INT8 or GGUF file beside the float32 one


class Uncertainty(Artifact):
    """Bootstrap intervals of everything that was scored on the same examples."""

    KIND: ClassVar[str] = "uncertainty"

    n_resamples: int
    files: dict[str, FileUncertainty]  # by label: "dense", "2x", "2x int8" …
    training: dict[str, Comparison]  # by member: model.onnx as trained beside the same as pruned; primary metric
