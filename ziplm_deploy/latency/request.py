"""What a latency table is asked for: measuring one and accepting one read the same request."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from exporters import ExportSettings
from exporters.gguf_checks import ARCHITECTURE
from exporters.gguf_file import BLOCK, VALUE_BYTES
from ziplm_deploy.engines import WorkerHandle, WorkerOptions, get_engine
from ziplm_deploy.errors import IncompatibleArtifactError, UsageError
from ziplm_deploy.latency.grid import DENSE, Grid
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import last_level_cache_bytes, machine_info
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import is_language_model
from ziplm_deploy.models.deployed import FLOAT32, CacheForm, Treatment, cache_form, export_settings
from ziplm_deploy.models.gguf_export import gguf_treatment
from ziplm_deploy.models.modules import model_shape
from ziplm_deploy.models.sentence_dense import layers_of_dense
from ziplm_deploy.models.shape import ModelShape, ModuleKind
from ziplm_deploy.recipe import EngineName, Environment, ExportConfig, ProfileConfig

# Stacks of weights this many times as large as the last cache are read from memory, as those of most models are.
CACHES = 3
USUAL_CACHE_BYTES = 32 * 2**20  # where the system does not tell
STACKS_MEMORY_SHARE = 4  # all stacks together may take one in so many bytes of the machine's memory

_ACTIVATIONS = ("hidden_act", "activation", "activation_function", "feed_forward_proj")

Wrap = Callable[[nn.Module], nn.Module]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, with nothing more in its graph."""
    return model


@dataclass(frozen=True)
class TableRequest:
    """Everything that a latency table depends on, but for the machine.

    Attributes:
        dense: a transformers model; its weights do not matter, only its shapes.
        output_names: outputs of the graph.
        wrap: puts what else is deployed around a model (pooling); ``output_names`` are outputs of that.
        treatment: what is done to members' files; cells and base go through it, the dense reference does not.
        baseline_engine: runs the dense reference; None: the environment's engine.
    """

    dense: nn.Module
    output_names: tuple[str, ...]
    environment: Environment
    profile: ProfileConfig
    export: ExportConfig
    wrap: Wrap = unwrapped
    treatment: Treatment = FLOAT32
    baseline_engine: EngineName | None = None

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Dimensions of the model; raises :class:`UnsupportedModelError` for one that cannot be pruned."""
        return model_shape(self.dense.config)  # type: ignore[arg-type]

    @functools.cached_property
    def grid(self) -> Grid:
        """Cells and whole models of the table."""
        grid = self._grid_of_least_depth
        if not self.environment.workload.generates:  # calls of many tokens compute much more than they read
            return grid
        return replace(grid, structure_bytes=self._structure_bytes, stack_bytes=self._stack_bytes)

    @property
    def _grid_of_least_depth(self) -> Grid:
        if self.served.gguf_type is None:
            return Grid(self.shape, self.profile)
        # Files fill widths up to whole blocks: others would cost what the next larger one costs.
        align = math.lcm(self.profile.width_align, BLOCK)
        profile = self.profile.model_copy(update={"width_align": align})
        return Grid(self.shape, profile, attention_has_ffn=True)

    @functools.cached_property
    def exported(self) -> Treatment:
        """How a model becomes a file as exported: ONNX in float32, or GGUF for llama.cpp.

        Raises:
            UsageError: nothing says which weights the latter is to have.
        """
        if not self.environment.runs_gguf:
            return FLOAT32
        if self.export.gguf is None:
            raise UsageError(
                "expected a type of weights for files of llama.cpp, found none; set export.gguf to Q8_0, Q4_0 or F16"
            )
        return gguf_treatment(self.export.gguf)

    @property
    def served(self) -> Treatment:
        """How a model becomes the file that serves: as exported, or with what ``treatment`` does to it."""
        return self.exported if self.treatment is FLOAT32 else self.treatment

    @property
    def _weight_bytes(self) -> float:
        if self.served.gguf_type is not None:
            return VALUE_BYTES[self.served.gguf_type]
        return 1.0 if self.served.variant.is_int8 else 4.0

    @property
    def _structure_bytes(self) -> dict[ModuleKind, float]:
        shape, weight_bytes = self.shape, self._weight_bytes
        gated = architecture_of(self.dense.config).is_gated  # type: ignore[arg-type]
        return {
            "attention": 2 * (shape.queries_per_head + 1) * shape.head_dim * shape.hidden_size * weight_bytes,
            "ffn": (3 if gated else 2) * shape.hidden_size * weight_bytes,
        }

    @property
    def _stack_bytes(self) -> int:
        """Weights of a stack: far more than caches hold, but not more than the model has, and than memory takes."""
        profile, structure_bytes = self.profile, self._structure_bytes
        if profile.stack_megabytes is not None:
            return int(profile.stack_megabytes * 1e6)
        layer_bytes = sum(structure_bytes[kind] * size for kind, size in self.shape.full_sizes.items())
        n_cells = len(self._grid_of_least_depth.cell_ids)
        memory = machine_info().memory_bytes // (STACKS_MEMORY_SHARE * n_cells)
        cache = last_level_cache_bytes() or USUAL_CACHE_BYTES
        return int(min(CACHES * cache, layer_bytes * self.shape.n_layers, memory or CACHES * cache))

    @property
    def graph(self) -> str:
        """What the graph holds beside the prunable shapes, in words; a table of another graph does not fit."""
        config: Any = self.dense.config
        activation = next((getattr(config, name) for name in _ACTIVATIONS if hasattr(config, name)), "")
        parts = [type(self.dense).__name__, str(activation)]
        if hasattr(config, "image_size"):
            parts.append(f"images of {config.image_size} in patches of {config.patch_size}")
        else:
            parts.append(f"vocabulary {config.vocab_size}, {config.num_labels} labels")
        architecture = architecture_of(config)
        if architecture.causal is not None:
            form = self.form if self.served.gguf_type is None else f"GGUF, {ARCHITECTURE}"
            cache = "cache from any empty one" if self.export.stock_optimum else "cache"
            parts.append(f"{form} {cache if is_language_model(self.dense) else 'attention'}")
        if architecture.shared_inputs:  # tables from before had a share of them in each cell
            parts.append(f"{' '.join(architecture.shared_inputs)} in the base")
        layers = layers_of_dense(self.dense)
        if layers:
            parts.append(f"Dense layers of {' '.join(str(layer.out_features) for layer in layers)}")
        return ", ".join([*parts, f"outputs {' '.join(self.output_names)}"])

    @property
    def settings(self) -> ExportSettings:
        """Settings of the exporter for every model of the table."""
        return export_settings(self.export, self.environment.workload)

    @property
    def form(self) -> CacheForm:
        """Form of the files of causal language models."""
        return cache_form(self.export, self.environment)

    @property
    def baseline(self) -> EngineName:
        """Engine of the dense reference."""
        return self.baseline_engine or self.environment.engine

    @property
    def times_dense_as_served(self) -> bool:
        """Whether the dense model is timed a second time, as the cells are: their sum must come near that."""
        return self.treatment is not FLOAT32 or self.baseline != self.environment.engine

    def engine_of(self, model_id: str) -> EngineName:
        """Engine that runs a model: the dense reference is the baseline's, all others are the environment's."""
        return self.baseline if model_id == DENSE else self.environment.engine

    def start_worker(self, engine: EngineName, *, holds_many: bool = False, wait: bool = True) -> WorkerHandle:
        """Start a worker for this table's models; ``wait`` and what it raises as in :meth:`Engine.start_worker`."""
        options = WorkerOptions.from_environment(self.environment)
        # Sixty sessions with an arena each would take gigabytes.
        return get_engine(engine).start_worker(replace(options, shared_arena=holds_many), wait=wait)


def check_table(table: LatencyTable, request: TableRequest, *, allow_foreign: bool = False) -> None:
    """Refuse a table that was not measured for this request, on this machine, with the engines installed here.

    ``allow_foreign`` accepts another machine or engine version, nothing else.

    Raises:
        IncompatibleArtifactError: lists everything that differs.
        EngineError: an engine is missing.
    """
    pairs = _asked_and_held(table, request) + ([] if allow_foreign else _here_and_there(table, request))
    differing = [f"{what}: expected {expected}, found {found}" for what, expected, found in pairs if expected != found]
    for kind, full in (("attention", request.shape.n_heads), ("ffn", request.shape.intermediate_size)):
        missing = {0, full} - {cell.size for cell in table.cells if cell.kind == kind}
        differing += [f"{kind} of size {size}: expected a measured cell, found none" for size in sorted(missing)]
    if differing:
        raise IncompatibleArtifactError(
            "the latency table does not fit:\n  "
            + "\n  ".join(differing)
            + "\nmeasure one with `ziplm-deploy profile`, or set profile.allow_foreign_table to accept another machine "
            "or engine version (predictions may then be far off)"
        )


def _asked_and_held(table: LatencyTable, request: TableRequest) -> list[tuple[str, object, object]]:
    """What a table must be of: name, what is asked for, what the table has."""
    return [
        ("engine", request.environment.engine, table.engine),
        ("environment", request.environment.describe(), table.environment.describe()),
        ("calls", request.environment.workload.calls, table.environment.workload.calls),
        ("model shape", request.shape.model_dump(), table.shape.model_dump()),
        ("graph", request.graph, table.graph),
        ("variant", request.served.variant, table.variant),
        ("form", request.served.description, table.form),
        ("baseline engine", request.baseline, table.baseline_engine),
        ("export shapes", request.export.shapes, table.shapes),
        ("opset", request.export.opset, table.opset),
    ]


def _here_and_there(table: LatencyTable, request: TableRequest) -> list[tuple[str, object, object]]:
    """Where a table was measured: name, what is here, what was there."""
    return [
        ("machine", machine_info().fingerprint, table.machine.fingerprint),
        ("engine version", get_engine(request.environment.engine).version(), table.engine_version),
        ("baseline engine version", get_engine(request.baseline).version(), table.baseline_engine_version),
    ]
