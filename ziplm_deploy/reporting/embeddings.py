"""Embeddings that a run keeps of what is searched: where they are, and reading them."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file

from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.tasks.search import Embedded


def embeddings_file(run_folder: Path, label: str) -> Path:
    """Embeddings by a file of this label, ``dense`` or ``2x int8``, in a run's folder."""
    return run_folder / "retrieval" / f"{label.replace(' ', '-')}.safetensors"


def load_embeddings(path: Path) -> Embedded:
    """Arrays of such a file by name.

    Raises:
        CorruptArtifactError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises errors of several kinds
        raise CorruptArtifactError(
            f"expected embeddings in {path}, found: {error}; delete the file and run the same command again"
        ) from error
