"""What the files of a family find, as the evaluation leaves it for reports."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.tasks.resampling import Comparison


class FileRetrieval(BaseModel):
    """Scores of one ONNX file by metric, see :attr:`ziplm_deploy.tasks.retrieval.Retrieval.metrics`."""

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95 %, bootstrap over the queries
    of_dense: dict[str, Comparison] = Field(default_factory=dict)  # empty for the dense file itself


class RetrievalScores(Artifact):
    """Scores of everything that searched the same passages for the same queries."""

    KIND: ClassVar[str] = "retrieval_scores"

    n_queries: int
    n_passages: int
    files: dict[str, FileRetrieval]  # by label: "dense", "2x", "2x int8" …
