"""What embeddings are to find in a set, whatever it holds: by one file, and against what the dense model embedded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ziplm_deploy.tasks.evaluation_set import EvaluationSet, ModelFunction
from ziplm_deploy.tasks.metrics import Metric
from ziplm_deploy.tasks.outcomes import Outcomes

Vectors = npt.NDArray[np.float32]
Embedded = dict[str, npt.NDArray[Any]]  # vectors [inputs, size] by what they are of: queries, passages; texts, images


class Search(ABC):
    """A set with the way that one family's embeddings are compared on it."""

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Every score by its name, the first one first."""

    @property
    @abstractmethod
    def n_queries(self) -> int:
        """Examples that scores are means over."""

    @property
    @abstractmethod
    def n_passages(self) -> int:
        """What each query is searched among."""

    def passage_lengths(self, processor: Any) -> list[int]:
        """Tokens of every passage that files of the run embed, before any is cut; empty where they embed none."""
        return []

    @abstractmethod
    def embed_own(self, function: ModelFunction, how: EvaluationSet) -> Embedded:
        """What a file of the run embeds; ``how`` says in which batches, its rows do not count."""

    def embed_fixed(self) -> Embedded:
        """What no file of the run embeds, computed once a run; nothing, unless another model has a part in it."""
        return {}

    @abstractmethod
    def found(self, own: Embedded, dense: Embedded) -> Outcomes:
        """What one file found, by what it embedded, and what the dense model did (with :meth:`embed_fixed`)."""

    @abstractmethod
    def right_and_wrong(self, outcomes: Outcomes) -> Outcomes:
        """Two made-up queries for intervals, see ``Task.right_and_wrong``."""
