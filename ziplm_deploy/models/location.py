"""Where a model lies: a local folder, a hub id, or a folder inside an installed package; and a file in it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path, PurePosixPath

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ziplm_deploy.errors import EnvironmentMismatchError, UnsupportedModelError

CONFIG_FILE = "config.json"
MAX_HUB_ID = 200  # characters; the hub has a limit of 96 for each part
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
    is_no_id = path.startswith((".", "/", "~")) or path.count("/") > 1 or len(path) > MAX_HUB_ID
    if os.path.exists(folder) or is_no_id:
        raise UnsupportedModelError(f"expected a model folder at {path:.200}, found no folder; check model.path")
    return path


def transformer_place(folder: str, named: str = "") -> str:
    """Where the transformers model of a folder is: in the sub-folder that is ``named``, or in the one that has it.

    Old sentence-transformers folders have it in ``0_Transformer``, which only tasks of embeddings read about.
    """
    place = Path(folder)
    if named or (place / CONFIG_FILE).is_file() or not (place / "modules.json").is_file():
        return str(place / named)
    below = [config.parent for config in place.glob(f"*/{CONFIG_FILE}") if any(config.parent.glob("*.safetensors"))]
    return str(below[0]) if len(below) == 1 else folder


def is_hub_id(path: str) -> bool:
    """Whether a path that a recipe names is a model of the hub: no package, no folder here, and shaped like an id."""
    return _HUB_ID.fullmatch(path) is not None and not os.path.exists(os.path.expanduser(path))


def public_name(path: str) -> str:
    """What to call a model where others read it: a hub id or package as it is, of a local folder its last part."""
    return path if is_hub_id(path) or path.startswith("package:") else os.path.basename(os.path.abspath(path))


def find_file(model: str, name: str, revision: str | None = None, *, must_know: bool = False) -> Path | None:
    """A file of a folder or of a hub id, through the hub's cache; None where the model has no such file.

    Without a connection a file is not there if it is not in the cache, which for most models was filled at once.

    Args:
        model: what :func:`resolve_model_path` gives.
        name: relative path, with ``/``.
        must_know: a cache that does not say whether there is such a file is an error.

    Raises:
        UnsupportedModelError: the name leads out of the folder, or the hub cannot be reached and has to be.
    """
    parts = PurePosixPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
        raise UnsupportedModelError(f"expected files inside of {model}, found {name!r}; get the model anew")
    if os.path.isdir(model):
        file = Path(model, *parts)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as error:  # before the class that it belongs to: not cached, and no connection
        if not must_know or try_to_load_from_cache(model, name, revision=revision) is _CACHED_NO_EXIST:
            return None
        raise UnsupportedModelError(
            f"expected a local folder or a reachable hub id, found {model!r}, no connection, and a cache that does not "
            f"say whether it has a file {name}; download it whole (hf download {model}) and give the folder"
        ) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"expected a local folder or a reachable hub id, found {model!r}: {error}; download it and give the folder"
        ) from error


def hub_version(model: str, revision: str | None = None) -> str:
    """Commit of a hub id as it is loaded here, or the revision where the hub's cache does not tell; nothing of folders.

    Raises:
        UnsupportedModelError: no such model, or none that can be reached.
    """
    if not is_hub_id(model):
        return ""
    file = find_file(model, CONFIG_FILE, revision)
    cached = file is not None and file.parent.parent.name == "snapshots"
    return file.parent.name if file is not None and cached else revision or ""


def package_folders(name: str) -> list[Path]:
    """Folders of an installed package, which is not imported.

    Raises:
        EnvironmentMismatchError: the package is not installed.
    """
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise EnvironmentMismatchError(
            f"expected the installed package {name}, found none; run: pip install {shlex.quote(name.replace('_', '-'))}"
        )
    return [Path(root) for root in spec.submodule_search_locations or ()]


def _package_folder(name: str) -> Path:
    for root in package_folders(name):
        # The model's own configuration stands above those of its sentence-transformers modules.
        for config in sorted(root.rglob(CONFIG_FILE), key=lambda path: (len(path.parts), path)):
            if any(config.parent.glob("*.safetensors")):
                above = config.parent.parent  # old sentence-transformers folders have the model in 0_Transformer
                return above if above != root and (above / "modules.json").is_file() else config.parent
    raise UnsupportedModelError(
        f"expected a folder with {CONFIG_FILE} and *.safetensors in the package {name}, found none; name another one"
    )
