"""An encoder, dense or resized, as an ONNX file with the input names that optimum expects."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

from exporters.constants import fold_products
from exporters.files import atomic_path
from exporters.heads import EmbeddingModel, ImageEmbeddingModel, evaluation_mode, pair
from exporters.norms import norms_with_biases
from exporters.residuals import residuals_as_sums
from exporters.shapes import fold_shapes

# protobuf cannot hold more in one file; the margin is for the graph itself.
_MAX_MODEL_BYTES = 2**31 - 2**25
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PER_TOKEN_OUTPUTS = ("last_hidden_state", "start_logits", "end_logits")
# Trained on texts filled up to one length, without a mask: each token attends to the padding, too.
_UNMASKED = ("siglip_text_model",)
# Tracing cost grows with the shape but the dynamic graph does not depend on it.
_TRACE_BATCH, _TRACE_TOKENS = 2, 16


class ExportError(ValueError):
    """The model or the settings cannot become an ONNX file."""


@dataclass(frozen=True)
class ExportSettings:
    """``static`` fixes ``batch_size`` and ``seq_len`` (tokens) in the graph; ``dynamic`` leaves both free."""

    shapes: Literal["dynamic", "static"] = "dynamic"
    opset: int = 17
    batch_size: int = 1
    seq_len: int = 128


class _Positional(nn.Module):
    """Positional tensors in, tuple of the named outputs out: what the tracer can follow."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.wrapped = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.wrapped(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self.outputs)


def input_names(model: nn.Module) -> list[str]:
    """Graph inputs in optimum's order; ``token_type_ids`` only where the model can tell two segments apart."""
    config: Any = model.config
    inner = model.wrapped if isinstance(model, (EmbeddingModel, ImageEmbeddingModel)) else model
    accepted = inspect.signature(inner.forward).parameters
    if "pixel_values" in accepted:
        return ["pixel_values"]
    names = [name for name in _TEXT_INPUTS if name in accepted]
    if getattr(config, "model_type", "") in _UNMASKED:
        names.remove("attention_mask")
    if getattr(config, "type_vocab_size", 2) < 2 and "token_type_ids" in names:
        names.remove("token_type_ids")
    return names


def dummy_inputs(model: nn.Module, settings: ExportSettings) -> dict[str, torch.Tensor]:
    """Random inputs to trace with: ``[batch_size, seq_len]`` for static shapes, small ones for dynamic shapes.

    Raises:
        ExportError: ``seq_len`` is more than the model has positions for.
    """
    config: Any = model.config
    names = input_names(model)
    static = settings.shapes == "static"
    batch_size = settings.batch_size if static else _TRACE_BATCH
    generator = torch.Generator().manual_seed(0)
    if names == ["pixel_values"]:
        height, width = pair(config.image_size)
        return {"pixel_values": torch.randn(batch_size, config.num_channels, height, width, generator=generator)}
    _check_positions(model, settings.seq_len)
    tokens = settings.seq_len if static else min(settings.seq_len, _TRACE_TOKENS)
    ids = torch.randint(0, config.vocab_size, (batch_size, tokens), generator=generator)
    if config.pad_token_id is not None:
        # RoBERTa and MPNet count positions by ids that are not padding.
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    if batch_size > 1:
        mask[-1, tokens - tokens // 4 :] = 0
        if config.pad_token_id is not None:  # by which a causal classifier knows padding
            ids[mask == 0] = config.pad_token_id
    tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: tensors[name] for name in names}


def export_encoder(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    output_names: list[str],
    path: Path,
    settings: ExportSettings,
) -> None:
    """Write ``model`` to ``path``; the file appears whole or not at all.

    ``inputs`` fix the shapes if ``settings.shapes`` is static, and are only traced with if it is dynamic.

    Raises:
        ExportError: more than 2 GB of weights, an input or output that the model does not have, or torch cannot
            express the model in ONNX.
        OSError: the file cannot be written.
    """
    names = [name for name in (*_TEXT_INPUTS, "pixel_values") if name in inputs]
    _check_size(model)
    ranks = _output_ranks(model, {name: inputs[name] for name in names}, output_names)
    dynamic_axes = _dynamic_axes(names, ranks) if settings.shapes == "dynamic" else None
    wrapped = _Positional(model, names, output_names)
    try:
        with (
            evaluation_mode(wrapped),
            norms_with_biases(wrapped),
            atomic_path(path) as temporary,
            warnings.catch_warnings(),
        ):
            # Tracer warnings tell about Python branches on shapes; parity is checked on other shapes afterwards.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapped,
                tuple(inputs[name] for name in names),
                str(temporary),
                input_names=names,
                output_names=output_names,
                dynamic_axes=dynamic_axes,
                opset_version=settings.opset,
                do_constant_folding=True,
                dynamo=False,
            )
            exported = onnx.load(str(temporary))
            residuals_as_sums(exported)
            fold_products(exported)
            fold_shapes(exported)
            onnx.save(exported, str(temporary))
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise ExportError(
            f"expected a model that opset {settings.opset} can express, found: {error}; try another one"
        ) from error


def _output_ranks(model: nn.Module, inputs: dict[str, torch.Tensor], output_names: list[str]) -> dict[str, int]:
    with evaluation_mode(model), torch.no_grad():
        outputs = model(**inputs)
    missing = [name for name in output_names if outputs.get(name) is None]
    if missing or not output_names:
        asked = ", ".join(missing) or "none"
        raise ExportError(f"expected output names among {', '.join(outputs)}, found {asked}; correct output_names")
    return {name: outputs[name].dim() for name in output_names}


def _dynamic_axes(inputs: list[str], output_ranks: dict[str, int]) -> dict[str, dict[int, str]]:
    text = "pixel_values" not in inputs
    axes = {name: {0: "batch_size", 1: "sequence_length"} if text else {0: "batch_size"} for name in inputs}
    for name, rank in output_ranks.items():
        per_token = text and (rank > 2 or name in _PER_TOKEN_OUTPUTS)
        axes[name] = {0: "batch_size", 1: "sequence_length"} if per_token else {0: "batch_size"}
    return axes


def _check_size(model: nn.Module) -> None:
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size_bytes > _MAX_MODEL_BYTES:
        raise ExportError(
            f"expected at most {_MAX_MODEL_BYTES / 1e9:.1f} GB of weights (one ONNX file holds no more), "
            f"found {size_bytes / 1e9:.1f} GB; choose a smaller model"
        )


def max_tokens(model: nn.Module) -> int:
    """Tokens that a text model has positions for; no limit, a very large number, for T5's distances."""
    config: Any = model.config
    positions: int = getattr(config, "max_position_embeddings", sys.maxsize)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa and MPNet count from there
            break
    return positions


def _check_positions(model: nn.Module, seq_len: int) -> None:
    positions = max_tokens(model)
    if seq_len > positions:
        raise ExportError(f"expected seq_len <= {positions}, the model's positions, found {seq_len}; shorten it")
