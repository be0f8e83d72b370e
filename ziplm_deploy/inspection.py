"""What can be pruned in a model, layer by layer, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ziplm_deploy import architectures
from ziplm_deploy.checkpoints import MEMBER_FILE, load
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.sources import resolve_model_path


def inspect_model(model: str | Path | nn.Module) -> list[dict[str, Any]]:
    """One row a layer: ``layer, heads, head_dim, ffn_width, parameters, prunable, reason``.

    ``model`` is a local folder, a hub id, ``package:NAME``, the folder of a family member, or a loaded model.

    Raises:
        UnsupportedModelError: no such model, or one that cannot be pruned; names what is supported.
        CorruptArtifactError: the folder of a family member is damaged.
    """
    rows = architectures.inspect_model(model if isinstance(model, nn.Module) else _open(str(model)))
    refused = [str(row["reason"]) for row in rows if not row["prunable"]]
    if refused:
        raise UnsupportedModelError(f"expected a model that can be pruned, found {refused[0]}")
    return rows


def _open(path: str) -> Any:
    resolved = resolve_model_path(path)
    if (Path(resolved) / MEMBER_FILE).exists():
        return load(resolved)
    local = {"local_files_only": True} if Path(resolved).is_dir() else {}
    try:
        return transformers.AutoConfig.from_pretrained(resolved, trust_remote_code=False, **local)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # any shape of JSON may be in there
        raise UnsupportedModelError(
            f"expected a folder with config.json or a reachable hub id, found {path!r}: {error}; check the path"
        ) from error
