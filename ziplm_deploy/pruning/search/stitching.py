"""Evaluate many plans quickly: pre-shrunk modules are swapped into one model, shared prefixes are not run again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ziplm_deploy.models.layer_skipping import SkippedLayer, layer_input, layers_skipped
from ziplm_deploy.models.modules import PrunableModule, layers_of, prunable_modules
from ziplm_deploy.models.resizing import Replacement, build_replacement, install, shared_copy
from ziplm_deploy.pruning.database import Database
from ziplm_deploy.pruning.search.space import Plan, SearchSpace
from ziplm_deploy.tasks import Task
from ziplm_deploy.tasks.batching import Batch

REPLACEMENT_BYTES = 512 * 2**20  # all levels of all modules of a large model would take gigabytes
_Value = TypeVar("_Value")


class _ByteCache(Generic[_Value]):
    """Values by key; once they take more than ``limit_bytes``, those unused for longest go."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self.held_bytes = limit_bytes, 0
        self._entries: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> _Value | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: _Value, size_bytes: int) -> None:
        """Add a value under a new key."""
        self._entries[key] = value, size_bytes
        self.held_bytes += size_bytes
        while self.held_bytes > self._limit_bytes:
            _, (_, dropped_bytes) = self._entries.popitem(last=False)
            self.held_bytes -= dropped_bytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries


class StitchedModel:
    """A model, dense or already resized, with any plan's modules swapped in.

    A forward pass starts at the first layer whose input is not cached: plans that share a prefix share its work.
    The cache of ``cache_bytes`` is keyed by (batch, levels of all earlier modules); that of built modules, of
    ``replacement_bytes``, by (module, level).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        database: Database,
        space: SearchSpace,
        cache_bytes: int,
        replacement_bytes: int = REPLACEMENT_BYTES,
    ) -> None:
        self.task = task
        self._space = space
        self._whole = model
        self._database = database
        self._modules: list[PrunableModule] = prunable_modules(model)
        self._model = shared_copy(model).eval()
        self._layers = layers_of(self._model)
        self._own_layers = list(self._layers)
        self._replacements: _ByteCache[Replacement] = _ByteCache(replacement_bytes)
        self._installed: list[int] = [0] * len(self._modules)
        self._hidden: _ByteCache[Tensor] = _ByteCache(cache_bytes)
        self._skipped: list[SkippedLayer] = []
        self._inputs: dict[int, Tensor] = {}
        for index, layer in enumerate(self._own_layers):
            layer.register_forward_pre_hook(self._recorder(index), with_kwargs=True)
        self._own_layers[0].register_forward_hook(self._note_format)

    def _recorder(self, index: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[index] = layer_input(args, kwargs)

        return record

    def _note_format(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        if not self._skipped:
            self._skipped = [SkippedLayer(output, layer) for layer in self._own_layers]

    def stitch(self, plan: Plan) -> None:
        """Install the plan's modules; only those that differ from what is installed are touched."""
        for index, level in enumerate(plan):
            if self._installed[index] != level:
                install(self._model, self._modules[index].layer, self._replacement(index, level))
                self._installed[index] = level

    def _replacement(self, index: int, level: int) -> Replacement:
        found = self._replacements.get((index, level))
        if found is None:
            module = self._modules[index]
            entry = self._database.modules[module.name][self._space.sizes[index][level]]
            found = build_replacement(self._whole, module, entry)
            parameters = (p for part in found.values() for p in part.parameters())
            self._replacements.put((index, level), found, sum(p.numel() * p.element_size() for p in parameters))
        return found

    def features(self, plan: Plan, batch: Batch, batch_index: int) -> Tensor:
        """Task features of one batch under ``plan``."""
        return self.features_of_state(self.state(plan, batch, batch_index))

    @torch.inference_mode()
    def features_of_state(self, state: Tensor) -> Tensor:
        """Task features of a state: plans change nothing after the layers."""
        return self.task.features_of_state(self._model, state)

    @torch.inference_mode()
    def state(self, plan: Plan, batch: Batch, batch_index: int) -> Tensor:
        """What task features of one batch under ``plan`` are made of."""
        self.stitch(plan)
        start, hidden = self._longest_prefix(plan, batch_index)
        self._inputs.clear()
        with layers_skipped(self._layers, self._skipped[:start], hidden):
            state = self.task.state(self._model, batch)
        self._remember(plan, batch_index, start)
        return state

    def _longest_prefix(self, plan: Plan, batch_index: int) -> tuple[int, Tensor | None]:
        for layer in range(len(self._own_layers) - 1, 0, -1):
            hidden = self._hidden.get((batch_index, plan[: 2 * layer]))
            if hidden is not None:
                return layer, hidden
        return 0, None

    def _remember(self, plan: Plan, batch_index: int, start: int) -> None:
        for layer, hidden in self._inputs.items():
            key = (batch_index, plan[: 2 * layer])
            if layer > start and key not in self._hidden:
                self._hidden.put(key, hidden, hidden.numel() * hidden.element_size())


class PlanLoss:
    """Mean divergence of a plan's features from those of the model as it is; over fixed batches, memoized by plan."""

    def __init__(self, stitched: StitchedModel, batches: Sequence[Batch], first_index: int = 0) -> None:
        self._stitched = stitched
        self._batches = list(batches)
        self._first_index = first_index  # batches of one stitched model have indices of their own in its cache
        whole: Plan = (0,) * len(stitched._modules)
        self._targets = [stitched.state(whole, batch, first_index + i) for i, batch in enumerate(self._batches)]
        self._weights = [len(next(iter(batch.values()))) for batch in self._batches]
        self._known: dict[Plan, float] = {}
        self._at_least: dict[Plan, float] = {}  # of plans that were given up: another target tries them again

    def __call__(self, plan: Plan, above: float = float("inf")) -> float:
        """Loss of ``plan``; ``inf`` as soon as it is certain to exceed ``above`` (divergences are never negative)."""
        if plan in self._known:
            return self._known[plan]
        if self._at_least.get(plan, above) > above:
            return float("inf")
        total, whole = 0.0, sum(self._weights)
        for index, (batch, target, weight) in enumerate(zip(self._batches, self._targets, self._weights, strict=True)):
            features = self._stitched.features(plan, batch, self._first_index + index)
            dense = self._stitched.features_of_state(target)
            total += weight * float(self._stitched.task.divergence(features, dense))
            if total / whole > above:
                self._at_least[plan] = total / whole
                return float("inf")
        self._known[plan] = total / whole
        return self._known[plan]
