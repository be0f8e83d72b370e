"""What can be pruned in a model, layer by layer, without loading its weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from ziplm_deploy.documents import shortened
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError, UsageError
from ziplm_deploy.models.adapted import adapted, model_class
from ziplm_deploy.models.architectures import ARCHITECTURES, CHOICES, why_not
from ziplm_deploy.models.config_file import config_of, read_config
from ziplm_deploy.models.gguf_source import GGUF_SUFFIX, check_gguf, load_gguf_config, model_place
from ziplm_deploy.models.location import transformer_place
from ziplm_deploy.models.member_files import MEMBER_FILE, load
from ziplm_deploy.models.modules import layers_of, model_shape
from ziplm_deploy.models.shape import ModuleId
from ziplm_deploy.models.two_towers import TOWER_TYPES, Reads


def inspect_model(model: str | Path | nn.Module, tower: Reads | None = None) -> list[dict[str, Any]]:
    """One row a layer: ``layer, heads, head_dim, ffn_width, parameters, prunable, reason``.

    ``model`` is a local folder, a hub id, ``package:NAME``, the folder of a family member, a loaded model, or a
    ``model_type`` of transformers, which stands for its default configuration. ``tower``: ``text`` or ``image``, of a
    checkpoint that holds two.

    Raises:
        UnsupportedModelError: no such model, two towers and none named, or one that cannot be pruned; names what is
            supported.
        CorruptArtifactError: ``config.json`` or the folder of a family member is damaged.
    """
    rows = layer_rows(model if isinstance(model, nn.Module) else _open(str(model), tower))
    refused = [str(row["reason"]) for row in rows if not row["prunable"]]
    if refused:
        raise UnsupportedModelError(f"expected a model that can be pruned, found {refused[0]}")
    return rows


def model_config(model: str, tower: Reads | None = None) -> Any:
    """The configuration of what :func:`inspect_model` takes; raises as it does, but for members reads no weights.

    Raises:
        UsageError: a tower is named, and the model is none.
    """
    resolved = _place(model)
    if resolved.endswith(GGUF_SUFFIX):
        check_gguf(Path(resolved))
        found = load_gguf_config(Path(resolved))
    else:
        found = _config(resolved, tower)
    if tower is not None and found.model_type not in TOWER_TYPES:
        raise UsageError(f"expected no --tower for a {found.model_type}, which has no two towers, found {tower}")
    return found


def _open(path: str, tower: Reads | None) -> Any:
    resolved = _place(path)
    if resolved.endswith(GGUF_SUFFIX):
        check_gguf(Path(resolved))
        return load_gguf_config(Path(resolved))
    if os.path.exists(os.path.join(resolved, MEMBER_FILE)):
        return load(resolved)
    return _config(resolved, tower)


def _place(path: str) -> str:
    """Folder, file or hub id; a model type stays as it is."""
    return path if _is_type(path) else model_place(path)


def _is_type(path: str) -> bool:
    return (path in CONFIG_MAPPING or path in ARCHITECTURES) and not os.path.exists(path)


def _config(resolved: str, tower: Reads | None) -> Any:
    if _is_type(resolved):
        return config_of({"model_type": resolved}, f"the defaults of {resolved}")
    return read_config(transformer_place(resolved), trust_remote_code=False, reads=tower)


def layer_rows(model_or_config: nn.Module | PretrainedConfig) -> list[dict[str, Any]]:
    """One row a layer: ``layer, heads, head_dim, ffn_width, parameters, prunable, reason``.

    An unsupported model gives a single row with ``prunable: False`` and the reason instead of an error.

    Raises:
        CorruptArtifactError: a configuration that transformers builds no model of.
    """
    config: Any = model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config
    reason = why_not(config)
    if reason is not None:
        why = f"{reason}; supported: {CHOICES}"
        return [
            {"layer": None, "heads": None, "head_dim": None, "ffn_width": None, "parameters": None}
            | {"prunable": False, "reason": why}
        ]
    shape = model_shape(config)
    kept: dict[str, list[int]] = getattr(model_or_config, "ziplm_kept", {})
    rows: list[dict[str, Any]] = []
    model = model_or_config if isinstance(model_or_config, nn.Module) else _without_weights(config)
    for layer, block in enumerate(layers_of(model)):
        heads = len(kept.get(str(ModuleId(layer, "attention")), range(shape.n_heads)))
        width = len(kept.get(str(ModuleId(layer, "ffn")), range(shape.intermediate_size)))
        parameters = sum(parameter.numel() for parameter in block.parameters())
        rows.append(
            {"layer": layer, "heads": heads, "head_dim": shape.head_dim, "ffn_width": width, "parameters": parameters}
            | {"prunable": True, "reason": ""}
        )
    return rows


def _without_weights(config: PretrainedConfig) -> nn.Module:
    """The dense model of a configuration, on the ``meta`` device: shapes that take no memory.

    Raises:
        CorruptArtifactError: transformers cannot build it.
    """
    causal = ARCHITECTURES[config.model_type].causal is not None
    try:
        with torch.device("meta"):
            built = model_class(config, "AutoModelForCausalLM" if causal else "AutoModel")
            model: nn.Module = adapted(built(copy.deepcopy(config)))
    except Exception as error:  # transformers trusts the fields of config.json, so that it may raise anything
        raise CorruptArtifactError(
            f"expected the settings of a {config.model_type} model, found: {type(error).__name__}: "
            f"{shortened(str(error))}; copy its config.json again"
        ) from error
    return model
