"""Heads that belong into the graph but not into the transformers model: pooling, Dense layers and normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import nn

Pooling = Literal["mean", "cls", "max", "lasttoken"]

# Mean pooling of an all-padding row would divide by zero; sentence-transformers clamps at the same value.
_SMALLEST_TOKEN_COUNT = 1e-9


def pool(
    token_vectors: torch.Tensor,
    attention_mask: torch.Tensor,
    pooling: Pooling,
    normalize: bool,
    dense: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Embedding ``[batch, size]`` of token vectors ``[batch, tokens, hidden]`` with mask ``[batch, tokens]``.

    ``size`` is ``hidden``, or what ``dense`` makes of the pooled vector before it is normalized.
    """
    if pooling == "cls":
        embedding = token_vectors[:, 0]  # [batch, hidden]
    elif pooling == "max":
        padding = attention_mask.unsqueeze(-1) == 0  # [batch, tokens, 1]
        embedding = token_vectors.masked_fill(padding, torch.finfo(token_vectors.dtype).min).amax(dim=1)
    elif pooling == "lasttoken":
        places = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)  # [tokens]
        last = (attention_mask * places).to(torch.int32).argmax(dim=1)  # [batch], padding on either side
        index = last[:, None, None].expand(-1, 1, token_vectors.shape[-1])  # [batch, 1, hidden]
        embedding = token_vectors.gather(1, index).squeeze(1)
    else:
        weights = attention_mask.unsqueeze(-1).to(token_vectors.dtype)  # [batch, tokens, 1]
        summed = (token_vectors * weights).sum(dim=1)  # [batch, hidden]
        embedding = summed / weights.sum(dim=1).clamp(min=_SMALLEST_TOKEN_COUNT)
    if dense is not None:
        embedding = dense(embedding)
    return nn.functional.normalize(embedding, p=2.0, dim=1) if normalize else embedding


def sentence_dense(model: nn.Module) -> nn.Sequential | None:
    """Dense layers ``[batch, hidden]`` to ``[batch, size]`` between pooling and normalization; None if there are none.

    They hang on the encoder as its sub-module ``sentence_dense``, so that they are copied, trained, saved and loaded
    with it. Its own ``forward`` does not call them.
    """
    found = getattr(model, "sentence_dense", None)
    return found if isinstance(found, nn.Sequential) else None


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

    def __init__(self, model: nn.Module, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"expected a pooling of {', '.join(get_args(Pooling))}, found {pooling!r}; correct it")
        self.wrapped = model
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.training = model.training

    @property
    def config(self) -> Any:
        """The wrapped model's configuration."""
        return self.wrapped.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """``last_hidden_state`` ``[batch, tokens, hidden]`` and ``sentence_embedding`` ``[batch, size]``."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.wrapped(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        embedding = pool(hidden, attention_mask, self.pooling, self.normalize, sentence_dense(self.wrapped))
        return {"last_hidden_state": hidden, "sentence_embedding": embedding}
