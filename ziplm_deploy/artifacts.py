"""Typed, versioned files between stages: schema version, atomic save, checked load.

JSON artifacts are pydantic models. A file is written whole or not at all (temporary file, fsync, rename).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from exporters import files
from ziplm_deploy.errors import CorruptArtifactError, StorageError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on any failure remove it.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    try:
        with files.atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise StorageError(
            f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another output_dir"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file that then becomes ``path``, atomically."""
    with atomic_path(path) as temporary:
        write(temporary)


class Artifact(BaseModel):
    """A JSON file with ``kind`` and ``schema_version``; both are checked when it is loaded."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int] = 1

    def save(self, path: Path) -> None:
        head = {"kind": self.KIND, "schema_version": self.SCHEMA_VERSION}
        write_text(path, json.dumps({**head, **self.model_dump(mode="json")}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file of this kind.

        Raises:
            CorruptArtifactError: missing, not JSON, of another kind or schema version, or fields are wrong.
        """
        what = cls.KIND.replace("_", " ")
        try:
            raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(
                f"expected a {what} in {path}, found: {error}; delete it and run the same command again"
            ) from error
        raw = raw if isinstance(raw, dict) else {}
        kind, version = raw.pop("kind", None), raw.pop("schema_version", None)
        if kind != cls.KIND or version != cls.SCHEMA_VERSION:
            raise CorruptArtifactError(
                f"expected a {what} of schema {cls.SCHEMA_VERSION} in {path}, found kind {kind!r}, schema {version!r}; "
                "make it again with this version of ziplm-deploy"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise CorruptArtifactError(f"expected a {what} in {path}, found wrong fields: {error}") from error


IGNORED = {".md", ".pyc"}  # files in a model's or data set's folder that no stage reads


CODE_VERSION = 1  # raise it when a stage computes something else from the same inputs


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def source_hash(source: str | None) -> str:
    """Hash of a file, or of all files in a folder; a hub or data set name stands for itself."""
    if source is None:
        return ""
    path = Path(source)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix not in IGNORED)
        listing = "".join(f"{p.relative_to(path)} {file_hash(p)}\n" for p in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    return source


def content_key(**inputs: Any) -> str:
    """Hash of everything that a stage depends on."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)

    text = json.dumps({"code": CODE_VERSION, **inputs}, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()
