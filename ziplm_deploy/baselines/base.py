"""What a baseline is: a file of the dense model that somebody else's tool makes, and the engine that runs it."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ziplm_deploy.artifacts import Artifact
from ziplm_deploy.errors import EngineError
from ziplm_deploy.machine.info import MachineInfo
from ziplm_deploy.tasks.resampling import Comparison
from ziplm_deploy.tasks.uncertainty import FileUncertainty


@dataclass(frozen=True)
class DenseSource:
    """The dense model that a baseline is made from.

    Attributes:
        onnx: its float32 file, checked against torch.
        model: gives the transformers model.
        batches: gives calibration inputs by name, of the shape that the file serves, padded to its tokens.
        machine: where it will run.
        export_trained_on: writes the ONNX file of the dense model after the training that the members had.
    """

    onnx: Path
    model: Callable[[], nn.Module]
    batches: Callable[[], Sequence[Mapping[str, np.ndarray]]]
    machine: MachineInfo
    export_trained_on: Callable[[Path], None]


class BaselineRecord(Artifact):
    """How a baseline was made, or why it cannot be made of this model."""

    KIND: ClassVar[str] = "baseline"

    tool: str  # that made it, with its version
    settings: str
    refused: str = ""  # what tool or engine said; then there is no file


class BaselineScores(Artifact):
    """How sure the scores of baselines are, and how they compare with those of the family's files."""

    KIND: ClassVar[str] = "baseline_scores"

    baselines: dict[str, FileUncertainty]  # by name
    gains: dict[str, dict[str, Comparison]]  # by a file's label, then by name: primary score less the file's


class Baseline(ABC):
    """One baseline, a page in this folder; ``BASELINE`` of the page is its only instance."""

    title: ClassVar[str]  # a few words for the report
    engine: ClassVar[str]  # that runs it
    files: ClassVar[tuple[str, ...]]  # in the baseline's folder; the engine is given the first
    calibrates: ClassVar[bool] = False  # whether it depends on calibration examples
    trains: ClassVar[bool] = False  # whether it takes the training of members, where that can change the dense model
    scales_span_batch: ClassVar[bool] = False  # whether an answer depends on the other examples of a call
    of_causal: ClassVar[bool] = False  # is made of language models, too
    answers_as_dense: ClassVar[bool] = False  # whether its scores are those of the dense model: then it is only timed

    @abstractmethod
    def tool(self) -> str:
        """Who makes the file, with versions.

        Raises:
            EngineError: it is not installed; names the command that installs it.
        """

    @abstractmethod
    def settings(self, machine: MachineInfo) -> str:
        """Settings that it is made with on this machine, in words.

        Raises:
            EngineError: the tool has none for such a machine.
        """

    @abstractmethod
    def make(self, dense: DenseSource, folder: Path) -> None:
        """Write :attr:`files` into an existing folder.

        Raises:
            EngineError: the tool refuses the model.
        """


def installed_version(distribution: str, install: str) -> str:
    """Version of an installed package; raises :class:`EngineError` with the command that installs it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise EngineError(f"expected {distribution}, found it not installed; run: {install}") from None


def said(error: Any) -> str:
    """First line of what a tool said, for a message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
