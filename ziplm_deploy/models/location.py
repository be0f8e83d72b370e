"""Where a model lies: a local folder, a hub id, or a folder inside an installed package."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path

from ziplm_deploy.errors import EnvironmentMismatchError, UnsupportedModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model_path(path: str) -> str:
    """Folder of ``package:NAME`` or of a local path, or the hub id as it is.

    Raises:
        EnvironmentMismatchError: the package is not installed.
        UnsupportedModelError: the package holds no model, or the path is no folder and cannot be a hub id.
    """
    if path.startswith("package:"):
        return str(_package_folder(path.removeprefix("package:")))
    folder = Path(os.path.expanduser(path))  # pathlib's raises for a user that there is not
    if os.path.isdir(folder):  # as below: False for a name too long for any file
        return str(folder)
    if os.path.exists(folder) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UnsupportedModelError(f"expected a model folder at {path}, found no folder; check model.path")
    return path


def is_hub_id(path: str) -> bool:
    """Whether a path that a recipe names is a model of the hub: no package, no folder here, and shaped like an id."""
    return _HUB_ID.fullmatch(path) is not None and not os.path.exists(os.path.expanduser(path))


def public_name(path: str) -> str:
    """What to call a model where others read it: a hub id or package as it is, of a local folder its last part."""
    return path if is_hub_id(path) or path.startswith("package:") else os.path.basename(os.path.abspath(path))


def _package_folder(name: str) -> Path:
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise EnvironmentMismatchError(
            f"expected the installed package {name}, found none; run: pip install {shlex.quote(name.replace('_', '-'))}"
        )
    for root in spec.submodule_search_locations or ():
        for config in sorted(Path(root).rglob("config.json")):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    raise UnsupportedModelError(
        f"expected a folder with config.json and *.safetensors in the package {name}, found none; name another package"
    )
