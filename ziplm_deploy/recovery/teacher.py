"""The teacher's answers, computed once an example where they fit into memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.recipe import RecoverConfig
from ziplm_deploy.recovery.examples import POSITION, Examples
from ziplm_deploy.recovery.losses import LayerOutputs
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch
from ziplm_deploy.tasks.evaluation_set import TOKENS_AT_ONCE

GROUP = 32  # examples that are answered at once for the cache


@dataclass(frozen=True)
class TeacherAnswers:
    """What the loss compares with: rows of features, and hidden states ``[tokens, hidden]`` of every wanted layer."""

    features: Tensor
    hidden: list[Tensor]


class Teacher:
    """A frozen model that answers batches of one set of examples; each is computed once if all fit into the cache.

    An answer depends on the example alone: not on what was asked before, and not on whether it comes from the cache.
    So a training that is resumed, with nothing in its cache, has the same targets as one that was not disturbed. To
    that end hidden states are rounded to float16 also where they are not kept, and examples are answered in groups of
    neighbours in length, always the same, whichever batches ask for them: the last digits of an answer are those of
    its batch. Where not all fit into the cache, the batch of the training itself is answered.

    Args:
        layers: whose hidden states are wanted; empty: none.
        cache_bytes: for all answers; hidden states are kept in float16 and without padding.
    """

    def __init__(
        self, model: nn.Module, task: Task, layers: Sequence[int], examples: Examples, cache_bytes: int
    ) -> None:
        self.model = model.eval()
        self.task = task
        self.layers = list(layers)
        self._examples, self._cache_bytes = examples, cache_bytes
        self._groups = _neighbours(examples.lengths, TOKENS_AT_ONCE if task.is_causal else None)
        self._group_of = {row: group for group in self._groups for row in group}
        self._known: dict[int, _Answer] = {}
        self._caching: bool | None = None if cache_bytes else False  # None: not known before the first batch
        self._precision: torch.dtype | None = None  # of the known answers

    @property
    def caching(self) -> bool:
        """Whether answers are kept; True also while that is not known yet."""
        return self._caching is not False

    @property
    def n_cached(self) -> int:
        """Examples that need no forward pass any more."""
        return len(self._known)

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor) -> TeacherAnswers:
        """Answers to ``batch``, whose rows are the examples ``positions`` ``[batch]``; on the device of ``batch``.

        Computed in the precision of the training, whose autocast is on: a teacher in float32 takes most of the time
        of a step in bf16, and its answers are kept in float16 anyway.
        """
        device = positions.device
        if next(self.model.parameters()).device != device:
            self.model = copy.deepcopy(self.model).to(device)  # the given one stays where it is
        self._forget_other_precisions(device)
        if self._caching is None:
            self._decide(device)
        if not self._caching:
            outputs, hidden = self._forward(batch)
            return TeacherAnswers(self.task.distilled(outputs, batch), [_rounded(states) for states in hidden])
        rows = positions.tolist()
        for row in rows:
            if row not in self._known:
                self._answer(self._group_of[row], device)
        with torch.autocast(device.type, enabled=False):  # which knows no float16 on CPUs
            return self._recall(batch, [self._known[row] for row in rows])

    def _forget_other_precisions(self, device: torch.device) -> None:
        """Let go of answers for a training in another precision: after a resume this one would not have them."""
        on = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if on else torch.float32
        if precision != self._precision:
            self._known.clear()
            self._precision = precision

    def _decide(self, device: torch.device) -> None:
        """Find out from the group in the middle whether all answers fit into the cache."""
        group = self._groups[len(self._groups) // 2]
        self._answer(group, device)
        answers = [self._known[row] for row in group]
        tokens = sum(answer.n_tokens for answer in answers)
        bytes_a_token = sum(answer.size_bytes for answer in answers) / max(tokens, 1)
        expected_tokens = self._examples.n_tokens or len(self._examples) * tokens / len(answers)
        self._caching = bytes_a_token * expected_tokens <= self._cache_bytes
        if not self._caching:
            self._known.clear()

    def _answer(self, group: list[int], device: torch.device) -> None:
        """Compute and keep the answers to a group of examples."""
        batch = self._examples.collate([self._examples[row] for row in group])
        batch = {name: value.to(device) for name, value in batch.items() if name != POSITION}
        self._known.update(zip(group, _split(self.task, batch, *self._forward(batch)), strict=True))

    def _forward(self, batch: Batch) -> tuple[Batch, list[Tensor]]:
        with LayerOutputs(self.model, self.layers) as recorded:
            outputs = {name: value.float() for name, value in self.task.forward(self.model, batch).items()}
        return outputs, recorded.packed(batch.get("attention_mask"))

    def _recall(self, batch: Batch, answers: list[_Answer]) -> TeacherAnswers:
        device = next(iter(batch.values())).device
        outputs = {name: _join(name, self.task, batch, answers).to(device) for name in self.task.feature_outputs}
        hidden = torch.cat([answer.hidden for answer in answers], dim=1).to(device).float()  # [layers, N, hidden]
        return TeacherAnswers(self.task.distilled(outputs, batch), list(hidden.unbind(0)))


def _neighbours(lengths: Sequence[int], most_tokens: int | None) -> list[list[int]]:
    """Examples in groups of like length: of :data:`GROUP`, or of fewer that have ``most_tokens`` with their padding."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(groups[-1]) if groups else GROUP
        is_full = size == GROUP or (most_tokens is not None and (size + 1) * lengths[row] > most_tokens)
        if is_full:
            groups.append([])
        groups[-1].append(row)
    return groups


def make_teacher(model: nn.Module, task: Task, examples: Examples, config: RecoverConfig) -> Teacher:
    """A teacher for these examples, with the hidden states that the losses need."""
    layers = range(model_shape(model.config).n_layers) if config.token_weight else ()  # type: ignore[arg-type]
    return Teacher(model, task, layers, examples, int(config.teacher_cache_gb * 2**30))


def _rounded(states: Tensor) -> Tensor:
    """Hidden states as the cache keeps them, in float32; what float16 cannot hold stays as it is."""
    exact, half = states.float(), states.half()
    return torch.where(torch.isfinite(half), half.float(), exact)


@dataclass(frozen=True)
class _Answer:
    """One example's answer on the CPU: outputs without padding, hidden states ``[layers, tokens, hidden]``.

    Hidden states are float16, or float32 where one of them is beyond that.
    """

    outputs: dict[str, Tensor]
    hidden: Tensor
    n_tokens: int

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hidden, *self.outputs.values()))


def _split(task: Task, batch: Batch, outputs: Batch, hidden: list[Tensor]) -> list[_Answer]:
    """Answers of the rows of a batch, each in memory of its own."""
    size = len(next(iter(batch.values())))
    mask = batch.get("attention_mask")
    counts = [len(hidden[0]) // size if hidden else 1] * size if mask is None else mask.sum(1).tolist()
    packed = torch.stack(hidden) if hidden else torch.zeros(0, sum(counts), 0)  # [layers, N, hidden]
    parts = torch.split(_rounded(packed).cpu(), counts, dim=1)

    def unpadded(name: str, row: int) -> Tensor:
        value = outputs[name][row]
        return (value[mask[row].bool()] if mask is not None and name in task.token_outputs else value).cpu().clone()

    return [
        _Answer({name: unpadded(name, row) for name in task.feature_outputs}, _compact(part), count)
        for row, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]


def _compact(states: Tensor) -> Tensor:
    """Rounded states in memory of their own."""
    half = states.half()
    return half if bool(torch.isfinite(half).all()) else states.clone()


def _join(name: str, task: Task, batch: Batch, answers: list[_Answer]) -> Tensor:
    """An output of the whole batch, padded again with zeros where it has a token axis."""
    values = [answer.outputs[name] for answer in answers]
    if name not in task.token_outputs:
        return torch.stack(values)
    mask = batch["attention_mask"].bool().cpu()  # [batch, length]
    joined = torch.zeros(*mask.shape, *values[0].shape[1:], dtype=values[0].dtype)
    joined[mask] = torch.cat(values)
    return joined
