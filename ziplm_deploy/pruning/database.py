"""The level database: what every module weighs, and how far it is off, at every size it may take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ziplm_deploy.architectures import PrunableModule, output_linear, prunable_modules
from ziplm_deploy.artifacts import atomic_path
from ziplm_deploy.config import MethodName, PruneConfig
from ziplm_deploy.errors import CorruptArtifactError, NumericalError, ZipLMError
from ziplm_deploy.pruning import baselines, obs
from ziplm_deploy.pruning.levels import LevelWeights
from ziplm_deploy.pruning.statistics import ModuleStats
from ziplm_deploy.resizing import dropped_as_is

KIND = "level_database"
SCHEMA_VERSION = 1
# Few tokens leave most directions of a Hessian unseen: with 500 tokens for 1,536 columns a damping of 0.01 lost two to
# three points of STS-B Spearman against 0.1. From 3 d tokens on this adds nothing to the default.
SMALL_SAMPLE_DAMPING = 0.03
OBS_METHODS = ("ziplm", "uniform")  # `uniform` differs from `ziplm` only in its plan


@dataclass
class Database:
    """Levels of every module: ``modules["0.ffn"][1536]``.

    ``damping``: the relative damping that each module needed; ``scores``: float64 [n] importance of every structure,
    only for the methods whose plans are made from it.
    """

    modules: dict[str, dict[int, LevelWeights]]
    damping: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def errors(self, name: str) -> dict[int, float]:
        """Relative error of every level of one module."""
        return {size: level.relative_error for size, level in self.modules[name].items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (t for levels in self.modules.values() for x in levels.values() for t in (x.kept, x.weight, x.bias))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically; raises ``StorageError``."""
        tensors = {f"{name}/scores": scores.contiguous() for name, scores in self.scores.items()}
        index: dict[str, dict[str, float]] = {}
        for name, levels in self.modules.items():
            index[name] = {str(size): level.relative_error for size, level in levels.items()}
            for size, level in levels.items():
                parts = {"kept": level.kept, "weight": level.weight, "bias": level.bias}
                tensors.update({f"{name}/{size}/{part}": tensor.contiguous() for part, tensor in parts.items()})
        head = {"kind": KIND, "schema_version": SCHEMA_VERSION, "errors": index, "damping": self.damping}
        with atomic_path(Path(path)) as temporary:
            _save_file(tensors, temporary, {"database": json.dumps(head)})

    @classmethod
    def load(cls, path: Path) -> Database:
        """Read a file that :meth:`save` wrote.

        Raises:
            CorruptArtifactError: missing, truncated, damaged, or of another schema.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                head = json.loads((file.metadata() or {})["database"])
                if (head["kind"], head["schema_version"]) != (KIND, SCHEMA_VERSION):
                    raise ValueError(f"kind {head['kind']!r}, schema {head['schema_version']!r}")
                modules = {name: _read_levels(file, name, errors) for name, errors in head["errors"].items()}
                damping = {name: float(value) for name, value in head["damping"].items()}
                keys = set(file.keys())
                scores = {name: file.get_tensor(f"{name}/scores") for name in modules if f"{name}/scores" in keys}
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptArtifactError(
                f"expected a level database of schema {SCHEMA_VERSION} in {path}, found: {error!r}; "
                "delete it and run the prune stage again"
            ) from error
        return cls(modules, damping, scores)


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # a full disk arrives as this
        raise OSError(str(error)) from error


def _read_levels(file: Any, name: str, errors: dict[str, float]) -> dict[int, LevelWeights]:
    levels: dict[int, LevelWeights] = {}
    for size, error in errors.items():
        kept, weight, bias = (file.get_tensor(f"{name}/{size}/{part}") for part in ("kept", "weight", "bias"))
        levels[int(size)] = LevelWeights(kept, weight, bias, float(error))
        if len(kept) != int(size):
            raise ValueError(f"{len(kept)} kept structures at level {size} of {name}")
    return levels


def build_levels(
    linear_weight: Tensor,
    bias: Tensor | None,
    stats: ModuleStats,
    group_size: int,
    sizes: Sequence[int],
    *,
    method: MethodName = "ziplm",
    damping: float = 0.01,
    centred: bool = True,
    seed: int = 0,
) -> dict[int, LevelWeights]:
    """Levels of one module, keyed by size; relative errors are over the undamped moments, bias included.

    The full size holds the weights as they are, error 0. Size 0 holds the mean output as its bias when ``centred``,
    else no bias: error exactly 1. ``layer-drop`` has only these two levels, whatever ``sizes`` says.

    Args:
        linear_weight: [hidden, n·group_size]; bias: [hidden] or None.
        sizes: numbers of kept structures, each in 0..n.

    Raises:
        NumericalError: statistics or weights not finite, or no damping makes the Hessian positive definite.
    """
    levels, _ = _build_levels(linear_weight, bias, stats, group_size, sizes, method, damping, centred, seed)
    return levels


def _build_levels(
    linear_weight: Tensor,
    bias: Tensor | None,
    stats: ModuleStats,
    group_size: int,
    sizes: Sequence[int],
    method: MethodName,
    damping: float,
    centred: bool,
    seed: int,
) -> tuple[dict[int, LevelWeights], float]:
    r, d = linear_weight.shape
    if d % group_size or stats.mean.numel() != d:
        raise ValueError(f"expected {d} columns in groups of {group_size}, found statistics of {stats.mean.numel()}")
    n = d // group_size
    if any(not 0 <= size <= n for size in sizes):
        raise ValueError(f"expected sizes in 0..{n}, found {list(sizes)}")
    W = linear_weight.detach().double()
    b = bias.detach().double() if bias is not None else torch.zeros(r, dtype=torch.float64)
    if not all(bool(torch.isfinite(x).all()) for x in (W, b, stats.hessian, stats.mean)):
        raise NumericalError("expected finite weights and statistics, found NaN or infinity; check the model")
    dense = LevelWeights(torch.arange(n), W.float(), b.float(), 0.0)
    inner = sorted({size for size in sizes if 0 < size < n}, reverse=True)
    used = 0.0
    if method in OBS_METHODS:
        found, used = _obs_levels(W, b, stats, group_size, inner, damping, centred)
    elif method == "layer-drop":
        found, centred = {}, False
    else:
        found = baselines.masked_levels(method, W, b, stats, group_size, inner, seed)
        centred = method == "flap"
    found = {n: dense, 0: dropped_level(W, b, stats, centred), **found}
    wanted = {n, 0} if method == "layer-drop" else set(sizes)
    return {size: found[size] for size in sorted(wanted, reverse=True)}, used


def dropped_level(W: Tensor, b: Tensor, stats: ModuleStats, centred: bool) -> LevelWeights:
    """Size 0: the mean output as bias, or nothing at all."""
    r = W.shape[0]
    kept, weight = torch.zeros(0, dtype=torch.int64), torch.zeros(r, 0)
    if not centred:
        return LevelWeights(kept, weight, torch.zeros(r), 1.0)
    shift = b + W @ stats.mean
    power = baselines.output_power(W, b, stats)
    remaining = power - float(shift.square().sum())  # E‖y − E y‖²
    return LevelWeights(kept, weight, shift.float(), baselines.ratio(remaining, power))


def _obs_levels(
    W: Tensor, b: Tensor, stats: ModuleStats, m: int, sizes: Sequence[int], damping: float, centred: bool
) -> tuple[dict[int, LevelWeights], float]:
    """Levels strictly between none and all by OBS, and the relative damping that was used."""
    if not sizes:
        return {}, damping
    damping = max(damping, SMALL_SAMPLE_DAMPING * W.shape[1] / stats.n_tokens)
    power = baselines.output_power(W, b, stats)
    moment = stats.moment(centred)  # [d, d]
    live = moment.diagonal() != 0
    mean_diagonal = float(moment.diagonal()[live].mean()) if bool(live.any()) else 1.0
    H, damping_used, _ = obs.damp(moment, damping)
    del moment  # as large as all weights together
    W_live = W * live  # a dead column carries nothing that varies: its weight is dropped, its mean goes to the bias
    order, _ = obs.removal_order(H, W_live, m)
    levels: dict[int, LevelWeights] = {}
    for level in obs.level_weights(H, W_live, order, sizes):
        columns = (level.kept[:, None] * m + torch.arange(m)).flatten()  # [k]
        change = W_live.clone()
        change[:, columns] -= level.weight
        # the level minimises tr(Δ(M + λI)Δᵀ), the error is tr(ΔMΔᵀ)
        error = level.damped_error - damping_used * float(change.square().sum())
        new_bias = b
        if centred:
            new_bias = b + W @ stats.mean - level.weight @ stats.mean[columns]
        relative = baselines.ratio(error, power)
        levels[level.size] = LevelWeights(level.kept, level.weight.float().contiguous(), new_bias.float(), relative)
    return levels, damping_used / mean_diagonal


def build_database(
    model: nn.Module,
    stats: Mapping[str, ModuleStats] | Iterable[tuple[str, ModuleStats]],
    sizes: Mapping[str, Sequence[int]],
    prune: PruneConfig,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Database:
    """Levels of every module that ``stats`` brings; one that was dropped before needs none and keeps its only level.

    Args:
        model: dense, or already resized; a module's largest level is what it has now.
        stats: by module name, or a stream of pairs (``calibration.iter_statistics``): then each Hessian is freed
            before the next group of layers is collected.
        sizes: by module name, e.g. from the latency table; must hold every module.
        progress: called with (modules done, modules in all).

    Raises:
        NumericalError: names the module.
    """
    modules: dict[str, PrunableModule] = {module.name: module for module in prunable_modules(model)}
    gone = [module for module in modules.values() if not module.structures]
    database = Database({module.name: {0: dropped_as_is(model, module)} for module in gone})
    pairs = stats.items() if isinstance(stats, Mapping) else stats
    for name, module_stats in pairs:
        module = modules[name]
        linear = output_linear(model, module)
        method, damping, centred = prune.method, prune.damping, prune.centred
        try:
            levels, used = _build_levels(
                linear.weight, linear.bias, module_stats, module.group_size, sizes[name], method, damping, centred, seed
            )
        except ZipLMError as error:
            raise type(error)(f"{name}: {error}") from error
        database.modules[name], database.damping[name] = levels, used
        if method in baselines.MASKING_METHODS:
            weight, size = linear.weight.detach(), module.group_size
            database.scores[name] = baselines.structure_scores(method, weight, module_stats, size, seed)
        if progress is not None:
            progress(len(database.modules), len(sizes))
    missing = sorted(set(sizes) - set(database.modules))
    if missing:
        raise ValueError(f"expected statistics of every module, found none of {', '.join(missing)}")
    # plans index levels in the order of the model's modules
    database.modules = {name: database.modules[name] for name in modules if name in database.modules}
    return database


def estimate_bytes(modules: Iterable[PrunableModule], sizes: Mapping[str, Sequence[int]], hidden: int) -> int:
    """Bytes that :func:`build_database` needs at most beside the model: all levels, all Hessians, one module's work."""
    levels = hessians = largest = 0
    for module in modules:
        d = module.structures * module.group_size
        columns = sum(sizes[module.name]) * module.group_size
        levels += 4 * hidden * (columns + len(sizes[module.name])) + 8 * sum(sizes[module.name])
        hessians += 8 * d * d
        # moment, damped H, factor and permuted copy, or H, G, S and their panels; W in five float64 versions
        largest = max(largest, 8 * (5 * d * d + 5 * hidden * d))
    return levels + hessians + largest
