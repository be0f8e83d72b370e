"""Typed, versioned files between stages: schema version, atomic save, checked load.

JSON artifacts are pydantic models. A file is written whole or not at all (temporary file, fsync, rename). One of an
older schema version is brought up to date when it is read, never on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict
from typing_extensions import Self

from exporters import files
from ziplm_deploy.documents import MAX_JSON_BYTES, read_json, shortened, shown
from ziplm_deploy.errors import CorruptArtifactError, StorageError


@contextlib.contextmanager
def _said_in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # of who reads what is printed meanwhile; files have none
        raise
    except OSError as error:
        raise StorageError(
            f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another output_dir"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on any failure remove it.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with _said_in_words(path), files.atomic_path(path) as temporary:
        yield temporary


def check_writable(path: Path) -> None:
    """Refuse a path that could not be written in the end, before the work for it begins; raises :class:`StorageError`.

    A file that is there stays as it is; folders that are missing are made.
    """
    if os.path.isdir(path):
        raise StorageError(f"expected a name for a file, found the folder {path}; name a file in it")
    with contextlib.suppress(_NotNeededError), atomic_path(path):
        raise _NotNeededError


class _NotNeededError(Exception):
    """Ends a write that was only tried."""


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``; on success it takes its place, whole and fsynced, on any failure it goes.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with _said_in_words(folder), files.atomic_folder(folder) as making:
        yield making


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file that then becomes ``path``, atomically."""
    with atomic_path(path) as temporary:
        write(temporary)


Fields = dict[str, Any]


class Artifact(BaseModel):
    """A JSON file with ``kind`` and ``schema_version``; both are checked when it is loaded.

    Attributes:
        MIGRATIONS: for an older schema version, how its fields become those of the next one; raises ``ValueError`` if
            they cannot. Version 0 are files from before the kind was written into them: a bare mapping.
        MAX_BYTES: of a file that is read.
        INDENT: None for files of many numbers, which would take a line each.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int] = 1
    MAX_BYTES: ClassVar[int] = MAX_JSON_BYTES
    INDENT: ClassVar[int | None] = 1
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {}

    def save(self, path: Path) -> None:
        """Write the fields with kind and schema version, atomically; raises :class:`StorageError`."""
        head = {"kind": self.KIND, "schema_version": self.SCHEMA_VERSION}
        write_text(path, json.dumps({**head, **self.model_dump(mode="json")}, indent=self.INDENT) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file of this kind, of this schema version or of an older one with a migration.

        Raises:
            CorruptArtifactError: missing, not JSON, of another kind or schema version, or fields are wrong.
        """
        what = cls.KIND.replace("_", " ")
        try:
            raw = read_json(Path(path), max_bytes=cls.MAX_BYTES)
        except (OSError, ValueError) as error:
            raise CorruptArtifactError(
                f"expected a {what} in {path}, found: {error}; delete it and run the same command again"
            ) from error
        fields: Fields = raw if isinstance(raw, dict) else {}
        if 0 in cls.MIGRATIONS and isinstance(raw, dict) and not {"kind", "schema_version"} & raw.keys():
            kind, version = cls.KIND, 0
        else:
            kind, version = fields.pop("kind", None), fields.pop("schema_version", None)
        if kind != cls.KIND or not cls._is_readable(version):
            raise CorruptArtifactError(
                f"expected a {what} of schema {cls.SCHEMA_VERSION} in {path}, found kind {shown(kind)}, "
                f"schema {shown(version)}; "
                "make it again with this version of ziplm-deploy"
            )
        try:
            for older in range(version, cls.SCHEMA_VERSION):
                fields = cls.MIGRATIONS[older](fields)
            return cls.model_validate(fields)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            # pydantic's is a ValueError; a migration meets values of any type
            found = shortened(str(error))
            raise CorruptArtifactError(
                f"expected a {what} in {path}, found wrong fields: {found}; delete it and run the same command again"
            ) from error

    @classmethod
    def _is_readable(cls, version: object) -> bool:
        """Whether a file of this schema version is one of today, or can become one."""
        known = isinstance(version, int) and not isinstance(version, bool) and 0 <= version <= cls.SCHEMA_VERSION
        return known and all(older in cls.MIGRATIONS for older in range(cast("int", version), cls.SCHEMA_VERSION))


IGNORED = {".md", ".pyc"}  # files in a model's or data set's folder that no stage reads
CODE_VERSION = 1  # raise it when a stage computes something else from the same inputs


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, followed by those of the weights that an ONNX file may keep beside it."""
    digest = hashlib.sha256()
    for part in parts_of(path):
        with part.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def parts_of(path: Path) -> list[Path]:
    """A file, and the weights that an ONNX file of more than 2 GB keeps beside it."""
    beside = files.weights_beside(path)
    return [path, beside] if beside.is_file() else [path]


def file_bytes(path: Path) -> int:
    """Size of a file with all its parts."""
    return sum(part.stat().st_size for part in parts_of(path))


def source_hash(source: str | None) -> str:
    """Hash of a file, or of all files in a folder; a hub or data set name stands for itself."""
    if source is None:
        return ""
    path = Path(source)
    if os.path.isfile(path):  # as below: False for a name too long for any file
        return file_hash(path)
    if os.path.isdir(path):
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix not in IGNORED)
        listing = "".join(f"{p.relative_to(path)} {file_hash(p)}\n" for p in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    return source


def content_key(**inputs: Any) -> str:
    """Hash of everything that a stage depends on; a model that has a ``fingerprint`` is represented by it."""

    def plain(value: Any) -> Any:
        if not isinstance(value, BaseModel):
            return str(value)
        return value.fingerprint if hasattr(value, "fingerprint") else value.model_dump(mode="json")

    text = json.dumps({"code": CODE_VERSION, **inputs}, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()
