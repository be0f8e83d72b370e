"""Heads that belong into the graph but not into the transformers model: pooling and normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

# Mean pooling of an all-padding row would divide by zero; sentence-transformers clamps at the same value.
_SMALLEST_TOKEN_COUNT = 1e-9


def pool(
    token_vectors: torch.Tensor, attention_mask: torch.Tensor, pooling: Literal["mean", "cls"], normalize: bool
) -> torch.Tensor:
    """Embedding ``[batch, hidden]`` of token vectors ``[batch, tokens, hidden]`` with mask ``[batch, tokens]``."""
    if pooling == "cls":
        embedding = token_vectors[:, 0]  # [batch, hidden]
    else:
        weights = attention_mask.unsqueeze(-1).to(token_vectors.dtype)  # [batch, tokens, 1]
        summed = (token_vectors * weights).sum(dim=1)  # [batch, hidden]
        embedding = summed / weights.sum(dim=1).clamp(min=_SMALLEST_TOKEN_COUNT)
    return nn.functional.normalize(embedding, p=2.0, dim=1) if normalize else embedding


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for the block; afterwards every sub-module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class EmbeddingModel(nn.Module):
    """A token encoder that also returns ``sentence_embedding``; ``last_hidden_state`` stays the first output,
    so that optimum's ``ORTModelForFeatureExtraction`` and sentence-transformers accept the exported file.

    Raises:
        ValueError: unknown pooling.
    """

    def __init__(self, model: nn.Module, pooling: Literal["mean", "cls"], normalize: bool) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"expected pooling 'mean' or 'cls', found {pooling!r}; correct it")
        self.model = model
        self.pooling: Literal["mean", "cls"] = pooling
        self.normalize = normalize
        self.training = model.training

    @property
    def config(self) -> Any:
        """The wrapped model's configuration."""
        return self.model.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """``last_hidden_state`` ``[batch, tokens, hidden]`` and ``sentence_embedding`` ``[batch, hidden]``."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        embedding = pool(hidden, attention_mask, self.pooling, self.normalize)
        return {"last_hidden_state": hidden, "sentence_embedding": embedding}
