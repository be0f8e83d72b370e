"""Scores of a file on a task, as the evaluation leaves them for reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from ziplm_deploy.artifacts import Artifact, Fields


def _from_bare_scores(fields: Fields) -> Fields:
    """Fields of schema 1 from a bare mapping of scores, the primary metric first."""
    return {"metric": next(iter(fields), ""), "scores": fields, "n_rows": None, "engine": None, "engine_version": None}


def _without_outcomes(fields: Fields) -> Fields:
    """Fields of schema 2 from those of schema 1, of which no outcomes were kept."""
    return {**fields, "examples": None, "outcomes_hash": None}


class Scores(Artifact):
    """What one ONNX file scored on the evaluation rows; None: not known of files from before it was recorded."""

    KIND: ClassVar[str] = "accuracy"
    SCHEMA_VERSION: ClassVar[int] = 2
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {0: _from_bare_scores, 1: _without_outcomes}

    metric: str = Field(min_length=1)  # the primary one, which accuracy budgets are about
    scores: dict[str, float]  # by metric; between the file and the dense one, too, where a task compares them
    by_label: dict[str, float] = Field(
        default_factory=dict
    )  # F1 of classes, or types of entities; empty: none, unknown
    n_rows: int | None
    engine: str | None  # that answered
    engine_version: str | None
    examples: str | None = None  # stands for the rows: files that were scored on the same compare example by example
    outcomes_hash: str | None = None  # of the file with what the model did on each of them

    @model_validator(mode="after")
    def _metric_is_scored(self) -> Self:
        if self.metric not in self.scores:
            raise ValueError(f"expected a score of {self.metric}, found {', '.join(self.scores) or 'none'}")
        return self

    @property
    def primary(self) -> float:
        """Score of the primary metric."""
        return self.scores[self.metric]


class Continuations(Artifact):
    """Texts that a causal language model went on with, the likeliest token at each step."""

    KIND: ClassVar[str] = "continuations"

    prompts: list[str]
    texts: list[str]  # what follows each prompt, without it
