"""The teacher's answers, computed once an example where they fit into memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.recipe import RecoverConfig
from ziplm_deploy.recovery.examples import Examples
from ziplm_deploy.recovery.losses import LayerOutputs
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch


@dataclass(frozen=True)
class TeacherAnswers:
    """What the loss compares with: rows of features, and hidden states ``[tokens, hidden]`` of every wanted layer."""

    features: Tensor
    hidden: list[Tensor]


class Teacher:
    """A frozen model that answers batches of one set of examples; each is computed once if all fit into the cache.

    Args:
        layers: whose hidden states are wanted; empty: none.
        n_tokens: of all examples together, without padding; decides with the first batch whether they fit.
        cache_bytes: for all answers; hidden states are kept in float16 and without padding.
    """

    def __init__(
        self, model: nn.Module, task: Task, layers: Sequence[int], n_examples: int, n_tokens: int, cache_bytes: int
    ) -> None:
        self.model = model.eval()
        self.task = task
        self.layers = list(layers)
        self._n_examples, self._n_tokens, self._cache_bytes = n_examples, n_tokens, cache_bytes
        self._known: dict[int, _Answer] = {}
        self._caching: bool | None = None if cache_bytes else False  # None: not known before the first batch

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
        rows, device = positions.tolist(), positions.device
        if all(row in self._known for row in rows):
            with torch.autocast(device.type, enabled=False):  # which knows no float16 on CPUs
                return self._recall(batch, [self._known[row] for row in rows])
        if next(self.model.parameters()).device != device:
            self.model = copy.deepcopy(self.model).to(device)  # the given one stays where it is
        with LayerOutputs(self.model, self.layers) as recorded:
            outputs = {name: value.float() for name, value in self.task.forward(self.model, batch).items()}
        hidden = recorded.packed(batch.get("attention_mask"))
        if self.caching:
            self._keep(rows, batch, outputs, hidden)
        return TeacherAnswers(self.task.features(outputs, batch), hidden)

    def _keep(self, rows: list[int], batch: Batch, outputs: Batch, hidden: list[Tensor]) -> None:
        answers = _split(self.task, batch, outputs, hidden)
        if self._caching is None:
            tokens = sum(answer.n_tokens for answer in answers)
            bytes_a_token = sum(answer.size_bytes for answer in answers) / max(tokens, 1)
            expected_tokens = self._n_tokens or self._n_examples * tokens / len(answers)
            self._caching = bytes_a_token * expected_tokens <= self._cache_bytes
        if not all(answer.is_finite for answer in answers):
            self._caching = False  # beyond float16: such answers are computed every time
        if self._caching:
            self._known.update(zip(rows, answers, strict=True))
        else:
            self._known.clear()

    def _recall(self, batch: Batch, answers: list[_Answer]) -> TeacherAnswers:
        device = next(iter(batch.values())).device
        outputs = {name: _join(name, self.task, batch, answers).to(device) for name in self.task.feature_outputs}
        hidden = torch.cat([answer.hidden for answer in answers], dim=1).to(device).float()  # [layers, N, hidden]
        return TeacherAnswers(self.task.features(outputs, batch), list(hidden.unbind(0)))


def make_teacher(model: nn.Module, task: Task, examples: Examples, config: RecoverConfig) -> Teacher:
    """A teacher for these examples, with the hidden states that the losses need."""
    layers = range(model_shape(model.config).n_layers) if config.token_weight else ()  # type: ignore[arg-type]
    limit = int(config.teacher_cache_gb * 2**30)
    return Teacher(model, task, layers, len(examples), examples.n_tokens, limit)


@dataclass(frozen=True)
class _Answer:
    """One example's answer on the CPU: outputs without padding, hidden states float16 ``[layers, tokens, hidden]``."""

    outputs: dict[str, Tensor]
    hidden: Tensor
    n_tokens: int

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hidden, *self.outputs.values()))

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.hidden).all())


def _split(task: Task, batch: Batch, outputs: Batch, hidden: list[Tensor]) -> list[_Answer]:
    """Answers of the rows of a batch, each in memory of its own."""
    size = len(next(iter(batch.values())))
    mask = batch.get("attention_mask")
    counts = [len(hidden[0]) // size if hidden else 1] * size if mask is None else mask.sum(1).tolist()
    packed = torch.stack(hidden) if hidden else torch.zeros(0, sum(counts), 0)  # [layers, N, hidden]
    parts = torch.split(packed.half().cpu(), counts, dim=1)

    def unpadded(name: str, row: int) -> Tensor:
        value = outputs[name][row]
        return (value[mask[row].bool()] if mask is not None and name in task.token_outputs else value).cpu().clone()

    return [
        _Answer({name: unpadded(name, row) for name in task.feature_outputs}, part.clone(), count)
        for row, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]


def _join(name: str, task: Task, batch: Batch, answers: list[_Answer]) -> Tensor:
    """An output of the whole batch, padded again with zeros where it has a token axis."""
    values = [answer.outputs[name] for answer in answers]
    if name not in task.token_outputs:
        return torch.stack(values)
    mask = batch["attention_mask"].bool().cpu()  # [batch, length]
    joined = torch.zeros(*mask.shape, *values[0].shape[1:], dtype=values[0].dtype)
    joined[mask] = torch.cat(values)
    return joined
