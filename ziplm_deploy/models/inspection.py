"""What can be pruned in a model, layer by layer, without loading its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.adapted import model_class
from ziplm_deploy.models.architectures import ARCHITECTURES, architecture_of, why_not
from ziplm_deploy.models.config_file import read_config
from ziplm_deploy.models.gguf_source import GGUF_SUFFIX, check_gguf, load_gguf_config, model_place
from ziplm_deploy.models.member_files import MEMBER_FILE, load
from ziplm_deploy.models.modules import layers_of, model_shape
from ziplm_deploy.models.shape import ModelShape, ModuleId


def inspect_model(model: str | Path | nn.Module) -> list[dict[str, Any]]:
    """One row a layer: ``layer, heads, head_dim, ffn_width, parameters, prunable, reason``.

    ``model`` is a local folder, a hub id, ``package:NAME``, the folder of a family member, or a loaded model.

    Raises:
        UnsupportedModelError: no such model, or one that cannot be pruned; names what is supported.
        CorruptArtifactError: ``config.json`` or the folder of a family member is damaged.
    """
    rows = layer_rows(model if isinstance(model, nn.Module) else _open(str(model)))
    refused = [str(row["reason"]) for row in rows if not row["prunable"]]
    if refused:
        raise UnsupportedModelError(f"expected a model that can be pruned, found {refused[0]}")
    return rows


def _open(path: str) -> Any:
    resolved = model_place(path)
    if resolved.endswith(GGUF_SUFFIX):
        check_gguf(Path(resolved))
        return load_gguf_config(Path(resolved))
    if (Path(resolved) / MEMBER_FILE).exists():
        return load(resolved)
    return read_config(resolved, trust_remote_code=False)


def layer_rows(model_or_config: nn.Module | PretrainedConfig) -> list[dict[str, Any]]:
    """One row a layer: ``layer, heads, head_dim, ffn_width, parameters, prunable, reason``.

    An unsupported model gives a single row with ``prunable: False`` and the reason instead of an error.
    """
    config: Any = model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config
    reason = why_not(config)
    if reason is not None:
        why = f"{reason}; supported: {', '.join(ARCHITECTURES)}"
        return [
            {"layer": None, "heads": None, "head_dim": None, "ffn_width": None, "parameters": None}
            | {"prunable": False, "reason": why}
        ]
    shape = model_shape(config)
    kept: dict[str, list[int]] = getattr(model_or_config, "ziplm_kept", {})
    rows: list[dict[str, Any]] = []
    for layer, parameters in enumerate(_parameters(model_or_config, shape)):
        heads = len(kept.get(str(ModuleId(layer, "attention")), range(shape.n_heads)))
        width = len(kept.get(str(ModuleId(layer, "ffn")), range(shape.intermediate_size)))
        rows.append(
            {"layer": layer, "heads": heads, "head_dim": shape.head_dim, "ffn_width": width, "parameters": parameters}
            | {"prunable": True, "reason": ""}
        )
    return rows


def _parameters(model_or_config: nn.Module | PretrainedConfig, shape: ModelShape) -> list[int]:
    """Parameters of every layer."""
    if isinstance(model_or_config, nn.Module):
        return [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model_or_config)]
    config: Any = copy.deepcopy(model_or_config)
    setattr(config, architecture_of(config).config_layers, min(shape.n_layers, 2))  # all but the first are alike
    causal = architecture_of(config).causal is not None
    with torch.device("meta"):  # takes no memory
        model = model_class(config, "AutoModelForCausalLM" if causal else "AutoModel")(config)
    found = _parameters(model, shape)
    return [*found, *found[-1:] * (shape.n_layers - len(found))]
