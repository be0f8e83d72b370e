"""From a torch model to the ONNX file that is deployed: head, export settings, and what is done to the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from exporters import EmbeddingModel, ExportError, ExportSettings, dummy_inputs, export_encoder
from exporters.heads import sentence_dense
from exporters.parity import ParityMismatch, check_parity
from ziplm_deploy.errors import ParityError, RecipeError, StorageError, UsageError
from ziplm_deploy.recipe import ExportConfig, ModelConfig, Recipe, Variant, Workload
from ziplm_deploy.tasks import Task


def with_embedding_head(model: nn.Module, settings: ModelConfig, export: ExportConfig) -> nn.Module:
    """The model with what else goes into its graph: pooling, Dense layers and normalization of sentence embeddings.

    Raises:
        RecipeError: the model has Dense layers, and the recipe wants no embedding in the graph.
    """
    if settings.task != "sentence-similarity" or not export.embed_in_graph:
        if sentence_dense(model) is not None:
            raise RecipeError(
                "expected export.embed_in_graph: true for a model with Dense layers after its pooling, which only the "
                "graph can hold, found false; change the recipe"
            )
        return model
    return EmbeddingModel(model, *settings.head).eval()


def output_names(task: Task, export: ExportConfig) -> list[str]:
    """Outputs of the graph of :func:`with_embedding_head`."""
    return [name for name in task.output_names if name != "sentence_embedding" or export.embed_in_graph]


def export_settings(export: ExportConfig, workload: Workload) -> ExportSettings:
    """Settings of the exporter for files that will answer this workload."""
    return ExportSettings(export.shapes, export.opset, workload.batch_size, workload.seq_len)


@dataclass(frozen=True)
class Treatment:
    """What makes a variant's file of a model. Every cell goes through it, so that it costs what it will cost.

    Attributes:
        variant: what the files are called; stored in the table.
        prepare: before the export: takes a transformers model, maybe without layers, that it may change in place
            (zeros in the weights), and returns the model to export.
        finish: after the export: rewrites the ONNX file in place (INT8); also gets the inputs that it was traced with.
        description: the settings in words; a table of other settings is refused even if the variant is the same.
    """

    variant: Variant
    prepare: Callable[[nn.Module], nn.Module]
    finish: Callable[[Path, Mapping[str, Tensor]], None]
    description: str = ""


FLOAT32 = Treatment(Variant.FP32, prepare=lambda model: model, finish=lambda path, inputs: None)


@dataclass(frozen=True)
class OnnxExport:
    """How a recipe's models become ONNX files, and how closely those must answer like torch."""

    model: ModelConfig
    export: ExportConfig
    settings: ExportSettings
    output_names: list[str]
    parity_atol: float

    @classmethod
    def from_recipe(cls, recipe: Recipe, task: Task) -> OnnxExport:
        """The export that a recipe asks for, of shapes that its workload needs."""
        export = recipe.export
        settings = export_settings(export, recipe.environment.workload)
        return cls(recipe.model, export, settings, output_names(task, export), recipe.benchmark.parity_atol)

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Inputs that a model is traced with."""
        return dummy_inputs(with_embedding_head(model, self.model, self.export), self.settings)

    def write(self, model: nn.Module, path: Path, name: str) -> float:
        """Export ``model`` to ``path`` and compare the file with torch on random inputs: the largest difference.

        Raises:
            UsageError, StorageError: as :meth:`write_to_be_timed`.
            ParityError: the file answers otherwise than torch; it is removed.
        """
        deployed, inputs = self.write_to_be_timed(model, path, name)
        served = dummy_inputs(deployed, replace(self.settings, shapes="static"))  # the shape that it will serve
        try:
            return check_parity(deployed, path, (inputs, served), self.parity_atol)
        except ParityMismatch as error:
            path.unlink(missing_ok=True)
            raise ParityError(str(error)) from error

    def write_to_be_timed(self, model: nn.Module, path: Path, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
        """Export ``model`` to ``path``, its answers unchecked; the model with its head, and the inputs of the trace.

        Raises:
            UsageError: the exporter cannot express the model.  StorageError: the file cannot be written.
        """
        deployed = with_embedding_head(model, self.model, self.export)
        try:
            inputs = dummy_inputs(deployed, self.settings)
            export_encoder(deployed, inputs, self.output_names, path, self.settings)
        except ExportError as error:
            raise UsageError(f"{name}: {error}") from error
        except OSError as error:
            raise StorageError(
                f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another "
                "output_dir"
            ) from error
        return deployed, inputs
