"""Distances and losses on logits: each takes float tensors and gives a scalar with a gradient; no task, no model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # label of a token that does not count, as in torch and transformers


def kl_divergence(candidate: Tensor, dense: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(dense) ‖ softmax(candidate)); logits ``[…, classes]``, scalar out, in nats."""
    log_q = candidate.float().log_softmax(-1)
    log_p = dense.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def bernoulli_divergence(candidate: Tensor, dense: Tensor) -> Tensor:
    """Mean over rows of the sum over classes of KL(σ(dense) ‖ σ(candidate)); logits ``[…, classes]``, in nats."""
    q, p = candidate.float(), dense.float()
    yes = p.sigmoid() * (functional.logsigmoid(p) - functional.logsigmoid(q))
    no = (-p).sigmoid() * (functional.logsigmoid(-p) - functional.logsigmoid(-q))
    return (yes + no).sum(-1).mean()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all entries of logits and labels (0 or 1) of one shape, in nats."""
    return functional.binary_cross_entropy_with_logits(logits.float(), labels.float())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labels other than :data:`IGNORED`, in nats; 0 if there is none, where torch gives NaN.

    logits: ``[…, classes]``; labels: int64 ``[…]``.
    """
    counted = labels != IGNORED
    chosen = logits[
        counted
    ].float()  # [labels, classes]; vocabulary-wide logits are large, so others are left out first
    return functional.cross_entropy(chosen, labels[counted], reduction="sum") / max(len(chosen), 1)


def sampled_cross_entropy(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of labels drawn from the distributions of the logits ``[…, classes]`` themselves, summed over rows.

    The outer product of its gradient has the Hessian of the summed :func:`kl_divergence` as its mean: the Fisher
    information, which labels of a data set do not give (Kunstner et al., "Limitations of the empirical Fisher
    approximation for natural gradient descent", 2019).
    """
    rows = logits.float().flatten(0, -2)
    labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator).squeeze(-1)
    return functional.cross_entropy(rows, labels, reduction="sum")


def sampled_binary_cross_entropy(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Binary cross-entropy of drawn labels, summed; to :func:`bernoulli_divergence` as the one above to its own."""
    labels = torch.bernoulli(logits.detach().float().sigmoid(), generator=generator)
    return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")


def sampled_direction(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Outputs times standard normal noise, summed: for distances with the Hessian of half the squared difference."""
    return (outputs.float() * torch.randn(outputs.shape, generator=generator)).sum()


def mean_squared(candidate: Tensor, wanted: Tensor) -> Tensor:
    """Mean of the squared difference of two tensors of one shape."""
    if candidate.shape != wanted.shape:  # torch would broadcast [n, 1] against [n] to [n, n]
        raise ValueError(f"expected tensors of one shape, found {tuple(candidate.shape)} and {tuple(wanted.shape)}")
    return torch.square(candidate.float() - wanted.float()).mean()
