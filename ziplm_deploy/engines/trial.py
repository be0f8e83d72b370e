"""Models run once where it does no harm: some engines end their whole process at a model that they cannot run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from ziplm_deploy.artifacts import Artifact, Fields
from ziplm_deploy.engines import WorkerHandle
from ziplm_deploy.errors import EngineError

MODEL = "on trial"


class ModelRefusedError(EngineError):
    """The engine came up, but rejects a model, or dies or hangs over it."""


class RefusedFiles(Artifact):
    """Files that an engine cannot run, as trials found them."""

    KIND: ClassVar[str] = "refused_files"
    # Before the kind was written into it, such a file was the mapping itself.
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {0: lambda fields: {"files": fields}}

    files: dict[str, str]  # name of the file in the run: what the engine said


class Trial:
    """A worker that may die; the next model then gets a new one. Use it as a context manager."""

    def __init__(self, start: Callable[[], WorkerHandle]) -> None:
        self._start = start
        self._worker: WorkerHandle | None = None

    def run(self, path: Path) -> None:
        """Load a model, run it once and let go of it.

        Raises:
            ModelRefusedError: the engine rejects it, dies or hangs.
            EngineError: the worker does not come up, or there is no such file.
        """
        if not path.is_file():
            raise EngineError(f"expected an ONNX file at {path}, found none; export it or check the path")
        if self._worker is None:
            self._worker = self._start()
        try:
            self._worker.load(MODEL, path)
            self._worker.time(MODEL, n=1, warmup=0)
            self._worker.unload(MODEL)
        except EngineError as error:
            self._worker.close()
            self._worker = None
            raise ModelRefusedError(str(error)) from error

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
