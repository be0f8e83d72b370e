"""How long the texts of a data set are, in tokens and before any is cut, beside the length that requests have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

SHORT = 0.75  # of a request


class TokenLengths(BaseModel):
    """Lengths of the examples of one data set, special tokens included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str  # stands for the examples that were counted
    examples: int
    median: int  # tokens
    p90: int
    longest: int
    limit: int  # tokens that the model gets
    cut: int  # examples that are longer, and lose their end

    @property
    def are_short(self) -> bool:
        """Whether most examples are so much shorter than requests that these stand for few of them."""
        return self.median < SHORT * self.limit

    @classmethod
    def of(cls, lengths: Sequence[int], limit: int, key: str, *, are_cut: bool) -> TokenLengths:
        """Statistics of at least one length; ``are_cut``: what is longer than ``limit`` loses its end."""
        tokens = np.asarray(lengths)
        median, p90 = np.percentile(tokens, [50, 90], method="lower").tolist()
        return cls(
            key=key,
            examples=len(tokens),
            median=median,
            p90=p90,
            longest=int(tokens.max()),
            limit=limit,
            cut=int((tokens > limit).sum()) if are_cut else 0,
        )
