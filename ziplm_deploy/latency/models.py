"""The models that a latency table times, built and exported one at a time, in the form that will serve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from transformers import AutoModel, PretrainedConfig

from exporters import ExportError, dummy_inputs, export_encoder
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.deployed import FLOAT32, Treatment, export_settings
from ziplm_deploy.models.levels import ffn_widths, head_counts
from ziplm_deploy.models.modules import layers_of, model_shape
from ziplm_deploy.models.resizing import random_resized, shared_copy
from ziplm_deploy.models.shape import ModelShape, ModuleKind
from ziplm_deploy.recipe import Environment, ExportConfig, ProfileConfig

Wrap = Callable[[nn.Module], nn.Module]


NO_LAYERS, BASE, DENSE, DENSE_AS_SERVED = "none", "base", "dense", "unpruned"


HIDDEN = ("last_hidden_state",)


# Whole models that show how far sums of cells are off: mean share of a module that each of them keeps.
WHOLE_SHARES = (0.55, 0.3, 0.16, 0.08)


TINY_VOCABULARY = 64  # a stack needs no real vocabulary, and its export would be mostly that


@dataclass(frozen=True)
class TableModel:
    """One model of a table; ``form`` is what it is served in, which the dense reference is not."""

    model_id: str
    build: Callable[[], nn.Module]
    output_names: tuple[str, ...]
    form: Treatment

    def export(self, path: Path, environment: Environment, export: ExportConfig) -> None:
        """Build the model and write the file that will be timed.

        Raises:
            UnsupportedModelError: the model cannot be exported.
        """
        model = self.build()
        settings = export_settings(export, environment.workload)
        try:
            inputs = dummy_inputs(model, settings)
            export_encoder(model, inputs, list(self.output_names), path, settings)
        except ExportError as error:
            raise UnsupportedModelError(f"cannot export the table's model {self.model_id!r}: {error}") from error
        self.form.finish(path, inputs)


def table_models(
    dense: nn.Module,
    profile: ProfileConfig,
    wrap: Wrap,
    output_names: tuple[str, ...],
    form: Treatment,
    *,
    unpruned: bool,
) -> Iterator[TableModel]:
    """Every model that a table needs; built one at a time to bound memory.

    ``unpruned``: also the dense model in the form and on the engine of the cells, to check their sum against.
    """
    depth = profile.stack_depth
    stack = random_stack(dense.config, depth)  # type: ignore[arg-type]

    def cell(kind: ModuleKind, size: int) -> nn.Module:
        sizes = {"attention": 0, "ffn": 0} | {kind: size}
        resized = random_resized(stack, {f"{layer}.{name}": sizes[name] for layer in range(depth) for name in sizes})
        return form.prepare(resized)

    # What a form changes must be a copy: parts of the dense model are shared with whoever gave it.
    def base_of(model: nn.Module) -> nn.Module:
        return form.prepare(copy.deepcopy(without_layers(model)))

    yield TableModel(DENSE, lambda: wrap(dense), output_names, FLOAT32)
    if unpruned:
        yield TableModel(DENSE_AS_SERVED, lambda: wrap(form.prepare(copy.deepcopy(dense))), output_names, form)
    for model_id, plan in pruned_samples(model_shape(dense.config), profile).items():  # type: ignore[arg-type]
        whole = lambda plan=plan: wrap(form.prepare(copy.deepcopy(random_resized(dense, plan))))  # noqa: E731
        yield TableModel(model_id, whole, output_names, form)
    yield TableModel(BASE, lambda: wrap(base_of(dense)), output_names, form)
    yield TableModel(NO_LAYERS, lambda: base_of(stack), HIDDEN, form)
    for kind, sizes in cell_sizes(model_shape(dense.config), profile).items():  # type: ignore[arg-type]
        for size in sizes:
            if (kind, size) != ("ffn", 0):  # the same model as attention of size 0
                build = lambda kind=kind, size=size: cell(kind, size)  # noqa: E731
                yield TableModel(cell_id(kind, size), build, HIDDEN, form)


def cell_id(kind: str, size: int) -> str:
    return f"{kind} {size}" if size else "both dropped"


def needed_ids(shape: ModelShape) -> set[str]:
    """Models without which there is no table: references, dropped modules and full sizes."""
    full = {cell_id("attention", shape.n_heads), cell_id("ffn", shape.intermediate_size), cell_id("ffn", 0)}
    return {NO_LAYERS, BASE, DENSE, DENSE_AS_SERVED, *full}


def whole_ids(shape: ModelShape, profile: ProfileConfig) -> set[str]:
    """Models with all their layers. They get a process each, as where they serve: beside others in one process, medium
    sizes ran up to 5 % faster."""
    return {DENSE, DENSE_AS_SERVED, *pruned_samples(shape, profile)}


def cell_sizes(shape: ModelShape, profile: ProfileConfig) -> dict[ModuleKind, list[int]]:
    """Sizes that a table holds for each kind, descending, full size and 0 included."""
    return {
        "attention": sorted(head_counts(shape.n_heads), reverse=True),
        "ffn": ffn_widths(shape.intermediate_size, profile.width_ratio, profile.width_align),
    }


def pruned_samples(shape: ModelShape, profile: ProfileConfig) -> dict[str, dict[str, int]]:
    """Model id and sizes of every whole model of a table: the same ones whenever a shape is profiled.

    Uneven as pruned models are: u ** (1/share - 1) with u uniform in [0, 1] is the share of a module that is kept, most
    of them near 0 if the mean share is small.
    """
    levels = cell_sizes(shape, profile)
    names = [(layer, kind) for layer in range(shape.n_layers) for kind in levels]
    wholes = {}
    for index, mean in enumerate(WHOLE_SHARES):
        u = (np.random.default_rng(index).permutation(len(names)) + 0.5) / len(names)
        kept = u ** (1 / mean - 1)  # [2 * layers]
        wholes[f"whole {index}"] = {
            f"{layer}.{kind}": _nearest(levels[kind], share) for (layer, kind), share in zip(names, kept, strict=True)
        }
    return wholes


def _nearest(sizes: list[int], share: float) -> int:
    return min(sizes, key=lambda size: abs(size - share * max(sizes)))


def without_layers(dense: nn.Module) -> nn.Module:
    """Embeddings and head of ``dense`` with no layer between; shares its parameters."""
    base = shared_copy(dense)
    del layers_of(base)[:]
    return base


def random_stack(config: PretrainedConfig, depth: int) -> nn.Module:
    """A model of ``depth`` full layers of this configuration, random weights, a tiny vocabulary and no head."""
    config = copy.deepcopy(config)
    setattr(config, architecture_of(config).config_layers, depth)
    if hasattr(config, "vocab_size"):
        config.vocab_size = min(config.vocab_size, TINY_VOCABULARY)
    model: nn.Module = AutoModel.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    return model.eval()
