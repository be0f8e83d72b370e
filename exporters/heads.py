"""Heads that belong into the graph but not into the transformers model: pooling, Dense layers and normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

Pooling = Literal["mean", "cls", "max", "lasttoken", "pooler"]  # pooler: the model's own head

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
    return finished(embedding, normalize, dense)


def pool_image(
    token_vectors: torch.Tensor,
    n_patches: int,
    pooling: Pooling,
    normalize: bool,
    dense: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Embedding ``[batch, size]`` of an image's vectors ``[batch, tokens, hidden]``, of which the last are of patches.

    ``cls`` takes the first, that of the class; ``mean`` and ``max`` are over the patches alone, as in timm.
    """
    patches = token_vectors[:, -n_patches:]  # [batch, patches, hidden]
    if pooling == "mean":
        embedding = patches.mean(dim=1)  # [batch, hidden]
    elif pooling == "max":
        embedding = patches.amax(dim=1)
    else:
        embedding = token_vectors[:, 0]
    return finished(embedding, normalize, dense)


def finished(
    embedding: torch.Tensor, normalize: bool, dense: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Embedding ``[batch, size]`` of a pooled vector ``[batch, hidden]``: Dense layers, then length 1 if asked for."""
    if dense is not None:
        embedding = dense(embedding)
    return nn.functional.normalize(embedding, p=2.0, dim=1) if normalize else embedding


def patches_of(config: Any) -> int:
    """Patches of an image of the size that a model is for."""
    height, width = pair(config.image_size)
    rows, columns = pair(config.patch_size)
    return (height // rows) * (width // columns)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def text_embedding(
    outputs: Any,
    attention_mask: torch.Tensor | None,
    pooling: Pooling,
    normalize: bool,
    dense: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Embedding ``[batch, size]`` from the named outputs of a text encoder; only ``pooler`` needs no mask."""
    if pooling == "pooler":
        return finished(outputs["pooler_output"], normalize, dense)
    assert attention_mask is not None  # only models with a head of their own read texts without one
    return pool(outputs["last_hidden_state"], attention_mask, pooling, normalize, dense)


def image_embedding(
    outputs: Any,
    config: Any,
    pooling: Pooling,
    normalize: bool,
    dense: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Embedding ``[batch, size]`` from the named outputs of an image encoder with this configuration."""
    if pooling == "pooler":
        return finished(outputs["pooler_output"], normalize, dense)
    return pool_image(outputs["last_hidden_state"], patches_of(config), pooling, normalize, dense)


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


class _WithHead(nn.Module):
    """A model with what makes one vector an input of its outputs."""

    poolings: ClassVar[tuple[str, ...]]  # those that its kind of input has

    def __init__(self, model: nn.Module, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        if pooling not in self.poolings:
            raise ValueError(f"expected a pooling of {', '.join(self.poolings)}, found {pooling!r}; correct it")
        self.wrapped = model
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.training = model.training

    @property
    def config(self) -> Any:
        """The wrapped model's configuration."""
        return self.wrapped.config


class EmbeddingModel(_WithHead):
    """A token encoder that also returns ``sentence_embedding``; ``last_hidden_state`` stays the first output,
    so that optimum's ``ORTModelForFeatureExtraction`` and sentence-transformers accept the exported file.

    Raises:
        ValueError: unknown pooling.
    """

    poolings = get_args(Pooling)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``last_hidden_state`` ``[batch, tokens, hidden]`` and ``sentence_embedding`` ``[batch, size]``."""
        optional = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}
        outputs = self.wrapped(input_ids=input_ids, **given)
        embedding = text_embedding(outputs, attention_mask, self.pooling, self.normalize, sentence_dense(self.wrapped))
        return {"last_hidden_state": outputs.last_hidden_state, "sentence_embedding": embedding}


class ImageEmbeddingModel(_WithHead):
    """An image encoder that returns ``image_embeds``, as the towers of transformers call them, and nothing else.

    Raises:
        ValueError: a pooling that images have not.
    """

    poolings = ("cls", "mean", "max", "pooler")

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``image_embeds`` ``[batch, size]`` of ``pixel_values`` ``[batch, channels, height, width]``."""
        outputs = self.wrapped(pixel_values=pixel_values)
        dense = sentence_dense(self.wrapped)
        return {"image_embeds": image_embedding(outputs, self.config, self.pooling, self.normalize, dense)}
