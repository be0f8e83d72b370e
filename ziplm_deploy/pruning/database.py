"""The level database: what every module weighs, and how far it is off, at every size it may take."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ziplm_deploy.artifacts import atomic_path
from ziplm_deploy.documents import parse_json, shortened
from ziplm_deploy.errors import CorruptArtifactError, ZipLMError
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import PrunableModule, output_linear, prunable_modules
from ziplm_deploy.models.resizing import dropped_as_is
from ziplm_deploy.progress import StepProgress
from ziplm_deploy.pruning.compensations import dropped_level
from ziplm_deploy.pruning.fisher import fisher_bytes
from ziplm_deploy.pruning.methods import OutputLinear, get_method
from ziplm_deploy.pruning.moments import InputMoments
from ziplm_deploy.pruning.tensor_file import TensorFileWriter
from ziplm_deploy.recipe import PruneConfig

KIND = "level_database"
SCHEMA_VERSION = 1
_HEADER_BYTES = 1024  # more than names, shapes and error of a level take in the header of its file


@dataclass
class Database:
    """Levels of every module: ``modules["0.ffn"][1536]``.

    ``damping``: the relative damping that each module needed; ``scores``: float64 [n] importance of every structure,
    only for the methods whose plans are made from it; ``losses``: divergence of the model's answers that an error of 1
    in a module costs to second order; ``fisher``: float32 [r, r] Fisher information at its output, where errors are
    weighted by it.
    """

    modules: dict[str, dict[int, LevelWeights]]
    damping: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

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
        built = (
            ModuleLevels(
                name,
                levels,
                self.damping.get(name),
                self.scores.get(name),
                self.losses.get(name),
                self.fisher.get(name),
            )
            for name, levels in self.modules.items()
        )
        save_levels(path, built, {name: list(levels) for name, levels in self.modules.items()})

    @classmethod
    def load(cls, path: Path) -> Database:
        """Read a file that :meth:`save` wrote.

        Raises:
            CorruptArtifactError: missing, truncated, damaged, or of another schema.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                head = parse_json((file.metadata() or {})["database"])
                if (head["kind"], head["schema_version"]) != (KIND, SCHEMA_VERSION):
                    raise ValueError(f"kind {head['kind']!r}, schema {head['schema_version']!r}")
                modules = {name: _read_levels(file, name, errors) for name, errors in head["errors"].items()}
                damping = {name: float(value) for name, value in head["damping"].items()}
                losses = {name: float(value) for name, value in head.get("losses", {}).items()}
                keys = set(file.keys())
                scores, fisher = (
                    {name: file.get_tensor(f"{name}/{kind}") for name in modules if f"{name}/{kind}" in keys}
                    for kind in ("scores", "fisher")
                )
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptArtifactError(
                f"expected a level database of schema {SCHEMA_VERSION} in {path}, found: {shortened(repr(error))}; "
                "delete it and run the prune stage again"
            ) from error
        return cls(modules, damping, scores, losses, fisher)


@dataclass(frozen=True)
class ModuleLevels:
    """What a database holds of one module; fields as in :class:`Database`, None for what it has not."""

    name: str
    levels: dict[int, LevelWeights]
    damping: float | None = None
    scores: Tensor | None = None
    loss: float | None = None
    fisher: Tensor | None = None


def save_levels(path: Path, built: Iterable[ModuleLevels], sizes: Mapping[str, Sequence[int]]) -> None:
    """Write the database of modules as they come, so that the levels of one alone are in memory; atomically.

    Args:
        built: of :func:`iter_levels`, whose errors leave the file as it was.
        sizes: of every module that may come, in the order of the model's modules.

    Raises:
        StorageError: the file cannot be written.
    """
    index: dict[str, dict[str, float]] = {}
    damping: dict[str, float] = {}
    losses: dict[str, float] = {}
    room = sum((len(found) + 3) * _HEADER_BYTES for found in sizes.values()) + _HEADER_BYTES
    with atomic_path(Path(path)) as temporary, temporary.open("r+b") as file:
        writer = TensorFileWriter(file, room)
        for module in built:
            name = module.name
            _write_tensors(writer, module)
            index[name] = {str(size): level.relative_error for size, level in module.levels.items()}
            damping.update({} if module.damping is None else {name: module.damping})
            losses.update({} if module.loss is None else {name: module.loss})
            del module  # before the next one is made
        ordered = {name: index[name] for name in sizes if name in index}  # in which plans index levels
        head = {"kind": KIND, "schema_version": SCHEMA_VERSION, "errors": ordered, "damping": damping}
        writer.finish({"database": json.dumps({**head, **({"losses": losses} if losses else {})})})


def _read_levels(file: Any, name: str, errors: dict[str, float]) -> dict[int, LevelWeights]:
    levels: dict[int, LevelWeights] = {}
    for size, error in errors.items():
        kept, weight, bias = (file.get_tensor(f"{name}/{size}/{part}") for part in ("kept", "weight", "bias"))
        levels[int(size)] = LevelWeights(kept, weight, bias, float(error))
        if len(kept) != int(size):
            raise ValueError(f"{len(kept)} kept structures at level {size} of {name}")
    return levels


def _write_tensors(writer: TensorFileWriter, module: ModuleLevels) -> None:
    for size, level in module.levels.items():
        for part, tensor in (("weight", level.weight), ("bias", level.bias), ("kept", level.kept)):
            writer.add(f"{module.name}/{size}/{part}", tensor)
    for kind, extra in (("scores", module.scores), ("fisher", module.fisher)):
        if extra is not None:
            writer.add(f"{module.name}/{kind}", extra)


def build_levels(
    linear: OutputLinear, sizes: Sequence[int], prune: PruneConfig, *, seed: int = 0
) -> tuple[dict[int, LevelWeights], float]:
    """Levels of one module, keyed by size, and the relative damping that its method needed (0: none).

    Relative errors are over the undamped moments, bias included. The full size holds the weights as they are, error 0.

    Args:
        sizes: numbers of kept structures, each in 0..n; the method may have levels of some of them only.

    Raises:
        NumericalError: no damping makes the Hessian positive definite.
    """
    n = linear.n_structures
    if any(not 0 <= size <= n for size in sizes):
        raise ValueError(f"expected sizes in 0..{n}, found {list(sizes)}")
    method = get_method(prune.method)
    wanted = method.level_sizes(sizes, n)
    found, damping = method.levels(linear, [size for size in wanted if 0 < size < n], prune, seed)
    dense = LevelWeights(torch.arange(n), linear.weight.float(), linear.bias.float(), 0.0)
    dropped = dropped_level(linear, moves_mean=method.moves_mean_to_bias(prune))
    found = {n: dense, 0: dropped, **found}
    return {size: found[size] for size in wanted}, damping


def level_for(
    model: nn.Module,
    module: PrunableModule,
    moments: InputMoments,
    size: int,
    prune: PruneConfig,
    *,
    seed: int = 0,
    fisher: Tensor | None = None,
) -> LevelWeights:
    """The level of one module at one size, for these moments of its inputs, and the Fisher information at its output.

    Raises:
        NumericalError: no damping makes the Hessian positive definite; names the module.
    """
    with _naming(module.name):
        levels, _ = build_levels(_output_of(model, module, moments, fisher), [size], prune, seed=seed)
    return levels[size]


def _output_of(model: nn.Module, module: PrunableModule, moments: InputMoments, fisher: Tensor | None) -> OutputLinear:
    linear = output_linear(model, module)
    weights = None if fisher is None else fisher.double()
    return OutputLinear.of(linear.weight, linear.bias, moments, module.group_size, weights)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors begin with the name of the module that they are about."""
    try:
        yield
    except ZipLMError as error:
        raise type(error)(f"{name}: {error}") from error


def build_database(
    model: nn.Module,
    stats: Mapping[str, InputMoments] | Iterable[tuple[str, InputMoments]],
    sizes: Mapping[str, Sequence[int]],
    prune: PruneConfig,
    *,
    seed: int = 0,
    fisher: Mapping[str, Tensor] | None = None,
    progress: StepProgress | None = None,
) -> Database:
    """Levels of every module that ``stats`` brings, in memory; see :func:`iter_levels` for arguments and errors."""
    database = Database({})
    for built in iter_levels(model, stats, sizes, prune, seed=seed, fisher=fisher, progress=progress):
        name = built.name
        database.modules[name] = built.levels
        if built.damping is not None:
            database.damping[name] = built.damping
        if built.scores is not None:
            database.scores[name] = built.scores
        if built.loss is not None:
            database.losses[name] = built.loss
        if built.fisher is not None:
            database.fisher[name] = built.fisher
    order = [module.name for module in prunable_modules(model)]  # in which plans index levels
    database.modules = {name: database.modules[name] for name in order if name in database.modules}
    return database


def iter_levels(
    model: nn.Module,
    stats: Mapping[str, InputMoments] | Iterable[tuple[str, InputMoments]],
    sizes: Mapping[str, Sequence[int]],
    prune: PruneConfig,
    *,
    seed: int = 0,
    fisher: Mapping[str, Tensor] | None = None,
    progress: StepProgress | None = None,
) -> Iterator[ModuleLevels]:
    """Levels of every module that ``stats`` brings; one that was dropped before needs none and keeps its only level.

    Args:
        model: dense, or already resized; a module's largest level is what it has now.
        stats: by module name, or a stream of pairs (``calibration.iter_statistics``): then each Hessian is freed
            before the next group of layers is collected.
        sizes: by module name, e.g. from the latency table; must hold every module.
        fisher: Fisher information at every module's output, by name, that errors are weighted by.
        progress: called with (modules done, modules in all).

    Raises:
        NumericalError: names the module.
    """
    modules: dict[str, PrunableModule] = {module.name: module for module in prunable_modules(model)}
    done: set[str] = set()
    for module in modules.values():
        if not module.structures:
            done.add(module.name)
            yield ModuleLevels(module.name, {0: dropped_as_is(model, module)})
    for name, moments in stats.items() if isinstance(stats, Mapping) else stats:
        information = None if fisher is None else fisher[name]
        with _naming(name):
            linear = _output_of(model, modules[name], moments, information)
            built = _levels_of(linear, name, sizes, prune, seed, information)
        yield built
        del moments, linear, built  # before those of the next module are made
        done.add(name)
        if progress is not None:
            progress(len(done), len(sizes))
    missing = sorted(set(sizes) - done)
    if missing:
        raise ValueError(f"expected statistics of every module, found none of {', '.join(missing)}")


def _levels_of(
    linear: OutputLinear,
    name: str,
    sizes: Mapping[str, Sequence[int]],
    prune: PruneConfig,
    seed: int,
    fisher: Tensor | None,
) -> ModuleLevels:
    levels, damping = build_levels(linear, sizes[name], prune, seed=seed)
    scores = get_method(prune.method).scores(linear, seed)
    if fisher is None:
        return ModuleLevels(name, levels, damping, scores)
    return ModuleLevels(name, levels, damping, scores, linear.output_power / 2, fisher.float())


def estimate_bytes(
    modules: Iterable[PrunableModule],
    sizes: Mapping[str, Sequence[int]],
    hidden: int,
    *,
    memory_limit_bytes: int | None = None,
    fisher: bool = False,
) -> int:
    """Bytes beside the model that building and saving levels takes at most: Hessians, levels and work of a module.

    Args:
        sizes: of the levels that the method has.
        memory_limit_bytes: for Hessians, which come in groups that it holds; None: all at once.
        fisher: with Fisher information at every output, and the factor of one.
    """
    modules = list(modules)
    outputs = [hidden for module in modules if module.structures]
    information = fisher_bytes(outputs) + 16 * hidden**2 if fisher else 0
    levels = hessians = hessian = largest = 0
    for module in modules:
        d = module.structures * module.group_size
        levels = max(levels, levels_bytes(module, sizes[module.name], hidden))
        hessians, hessian = hessians + 8 * d * d, max(hessian, 8 * d * d)
        # moment, damped H, factor and permuted copy, or H, G, S and their panels; W in five float64 versions
        largest = max(largest, 8 * (5 * d * d + 5 * hidden * d))
    if memory_limit_bytes is not None:
        hessians = min(hessians, max(memory_limit_bytes, hessian))
    return levels + hessians + largest + information


def levels_bytes(module: PrunableModule, sizes: Sequence[int], hidden: int) -> int:
    """Bytes of all levels of one module."""
    columns = sum(sizes) * module.group_size
    return 4 * hidden * (columns + len(sizes)) + 8 * sum(sizes)
