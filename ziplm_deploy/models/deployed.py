"""From a torch model to the ONNX file that is deployed: head, export settings, and what is done to the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exporters import (
    DecoderExportSettings,
    EmbeddingHead,
    EmbeddingModel,
    ExportError,
    ExportSettings,
    ImageEmbeddingModel,
    ScoreHead,
    check_decoder_parity,
    dummy_inputs,
    export_causal_encoder,
    export_decoder,
    export_encoder,
    max_tokens,
)
from exporters.decoder_parts import LinearPart
from exporters.heads import evaluation_mode, sentence_dense
from exporters.parity import ParityMismatch, check_parity
from ziplm_deploy.errors import ParityError, RecipeError, StorageError, UsageError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import is_language_model
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.recipe import Environment, ExportConfig, GgufType, ModelConfig, Recipe, Variant, Workload
from ziplm_deploy.tasks import Task

CacheForm = Literal["onnxruntime", "portable"]
MAX_POSITIONS = 8192  # tokens that the tables of positions in a file reach; they take memory in every process
PARITY_PROMPTS = (12, 7)  # tokens of the prompts that a file is compared with torch on


def longest_text(model: nn.Module) -> int:
    """Tokens that a model's file takes: as many as it has positions for, of a causal one up to ``MAX_POSITIONS``."""
    positions = max_tokens(model)
    is_causal = architecture_of(model.config).causal is not None  # type: ignore[arg-type]
    return min(positions, MAX_POSITIONS) if is_causal else positions


def with_embedding_head(model: nn.Module, settings: ModelConfig, export: ExportConfig) -> nn.Module:
    """The model with what else goes into its graph: pooling, Dense layers and normalization of embeddings.

    Raises:
        RecipeError: only the graph can make the embedding, and the recipe wants none in it.
    """
    if not settings.makes_embeddings:
        return model
    pooling, normalize = settings.head
    of_images = settings.task == "image-feature-extraction"
    if not export.embed_in_graph:
        if of_images or pooling == "pooler" or sentence_dense(model) is not None:
            raise RecipeError(
                "expected export.embed_in_graph: true for images, and for texts whose model has a head or Dense layers "
                "that only the graph can hold, found false; change the recipe"
            )
        return model
    wrapper = ImageEmbeddingModel if of_images else EmbeddingModel
    return wrapper(model, pooling, normalize).eval()


def output_names(task: Task, export: ExportConfig) -> list[str]:
    """Outputs of the graph of :func:`with_embedding_head`."""
    return [name for name in task.output_names if name != "sentence_embedding" or export.embed_in_graph]


def export_settings(export: ExportConfig, workload: Workload) -> ExportSettings:
    """Settings of the exporter for files that will answer this workload."""
    return ExportSettings(export.shapes, export.opset, workload.batch_size, workload.seq_len)


def other_form(model: nn.Module, export: ExportConfig, environment: Environment) -> dict[str, str]:
    """For keys of what depends on the form of a causal model's files: that form, where it is not the fused one."""
    if architecture_of(model.config).causal is None:  # type: ignore[arg-type]
        return {}
    form = cache_form(export, environment)
    return {} if form == "onnxruntime" else {"form": form}


def cache_form(export: ExportConfig, environment: Environment) -> CacheForm:
    """Form of the files of causal language models that a recipe asks for, or that its engine runs best."""
    return export.cache_form or ("onnxruntime" if environment.engine == "onnxruntime" else "portable")


def write_graph(
    model: nn.Module,
    path: Path,
    output_names: list[str],
    settings: ExportSettings,
    form: CacheForm,
    *,
    stock_optimum: bool = False,
) -> dict[str, Tensor]:
    """Write a model, with its head, to ``path``; returns inputs to compare it on, none for one that writes text.

    ``form``: of a causal model, whose file takes texts as long as the model does, up to ``MAX_POSITIONS``;
    ``stock_optimum``: see :class:`exporters.DecoderExportSettings`.

    Raises:
        ExportError: the exporter cannot express the model.  OSError: the file cannot be written.
    """
    config: Any = model.config
    if architecture_of(config).causal is None:
        inputs = dummy_inputs(model, settings)
        export_encoder(model, inputs, output_names, path, settings)
        return inputs
    inner = model.wrapped if isinstance(model, EmbeddingModel) else model
    parts = causal_parts(inner)
    longest = min(parts.max_positions, MAX_POSITIONS)
    if settings.seq_len > longest:
        raise ExportError(f"expected requests within {longest} tokens, found {settings.seq_len}; shorten them")
    if is_language_model(inner):
        export_decoder(parts, path, DecoderExportSettings(longest, form, settings.opset, stock_optimum=stock_optimum))
        return {}
    export_causal_encoder(parts, _head(model), output_names, path, settings, form=form, max_length=longest)
    return dummy_inputs(model, settings)


def _head(model: nn.Module) -> EmbeddingHead | ScoreHead | None:
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear):  # of a classifier
        return ScoreHead(LinearPart(score.weight.detach(), None if score.bias is None else score.bias.detach()))
    if not isinstance(model, EmbeddingModel):
        return None
    return EmbeddingHead(model.pooling, model.normalize, tuple(sentence_dense(model.wrapped) or ()))


@dataclass(frozen=True)
class Treatment:
    """What makes a variant's file of a model. Every cell goes through it, so that it costs what it will cost.

    Attributes:
        variant: what the files are called; stored in the table.
        prepare: before the export: takes a transformers model, maybe without layers, that it may change in place
            (zeros in the weights), and returns the model to export.
        finish: after the export: rewrites the ONNX file in place (INT8); also gets the inputs that it was traced with.
        description: the settings in words; a table of other settings is refused even if the variant is the same.
        gguf_type: of the weights of a GGUF file, which it is then; None: an ONNX file.
    """

    variant: Variant
    prepare: Callable[[nn.Module], nn.Module]
    finish: Callable[[Path, Mapping[str, Tensor]], None]
    description: str = ""
    gguf_type: GgufType | None = None


FLOAT32 = Treatment(Variant.FP32, prepare=lambda model: model, finish=lambda path, inputs: None)


@dataclass(frozen=True)
class OnnxExport:
    """How a recipe's models become ONNX files, and how closely those must answer like torch."""

    model: ModelConfig
    export: ExportConfig
    settings: ExportSettings
    output_names: list[str]
    parity_atol: float
    form: CacheForm = "onnxruntime"

    @classmethod
    def from_recipe(cls, recipe: Recipe, task: Task) -> OnnxExport:
        """The export that a recipe asks for, of shapes that its workload needs."""
        export = recipe.export
        settings = export_settings(export, recipe.environment.workload)
        form = cache_form(export, recipe.environment)
        return cls(recipe.model, export, settings, output_names(task, export), recipe.parity_atol, form)

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
        try:
            if not inputs:
                return _check_causal(deployed, path, self.parity_atol)
            served = dummy_inputs(deployed, replace(self.settings, shapes="static"))  # the shape that it will serve
            return check_parity(deployed, path, (inputs, served), self.parity_atol)
        except ParityMismatch as error:
            path.unlink(missing_ok=True)
            raise ParityError(f"{error}; benchmark.parity_atol of the recipe is the limit") from error

    def write_to_be_timed(self, model: nn.Module, path: Path, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
        """Export ``model`` to ``path``, its answers unchecked; the model with its head, and the inputs of the trace.

        Raises:
            UsageError: the exporter cannot express the model.  StorageError: the file cannot be written.
        """
        deployed = with_embedding_head(model, self.model, self.export)
        try:
            stock = self.export.stock_optimum
            inputs = write_graph(deployed, path, self.output_names, self.settings, self.form, stock_optimum=stock)
        except ExportError as error:
            raise UsageError(f"{name}: {error}") from error
        except OSError as error:
            raise StorageError(
                f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another "
                "output_dir"
            ) from error
        return deployed, inputs


def _check_causal(model: nn.Module, path: Path, atol: float) -> float:
    """Largest difference of logits to torch, over two prompts and tokens after them; raises as check_parity."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in PARITY_PROMPTS]
    with evaluation_mode(model):
        return check_decoder_parity(lambda ids: model(input_ids=ids, use_cache=False).logits, path, prompts, atol)
