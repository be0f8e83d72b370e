"""Every error that the package raises on purpose.

::

    ZipLMError                       exit code 1: the work failed
    ├── UsageError                   exit code 2: what was asked for is not possible as asked
    │   ├── RecipeError              a recipe field is missing, misspelt or out of range
    │   ├── UnsupportedModelError    architecture or weight format that cannot be pruned
    │   ├── DataError                data set missing, empty, too small, labels do not match
    │   └── EnvironmentMismatchError more threads than granted, engine missing
    ├── ArtifactError                a table, database, plan or checkpoint cannot be used
    │   ├── CorruptArtifactError     truncated or not of the expected schema
    │   └── IncompatibleArtifactError measured elsewhere: machine, engine, shape or variant differ
    ├── NumericalError               NaN activations, a factorization that failed for good
    ├── EngineError                  the inference engine refused a model or its worker died
    ├── ParityError                  an exported or reloaded model gives other answers
    ├── StorageError                 no disk space, folder not writable
    │   └── FolderInUseError         another run is in the folder
    └── TargetUnreachableError       exit code 3: no plan is that fast; names the largest speedup

A message has three parts: what was expected, what was found, what to do.
"""

from __future__ import annotations


class ZipLMError(Exception):
    """Base class of all errors of this package; ``exit_code`` is what the CLI returns."""

    exit_code = 1


class UsageError(ZipLMError):
    """What was asked for is not possible as asked."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe field is missing, misspelt or out of range."""


class UnsupportedModelError(UsageError):
    """The architecture or the weight format cannot be handled."""


class DataError(UsageError):
    """A data set is missing, empty, too small, or its labels do not match the model."""


class EnvironmentMismatchError(UsageError):
    """The machine does not grant what the recipe asks for."""


class ArtifactError(ZipLMError):
    """A file of an earlier stage cannot be used."""


class CorruptArtifactError(ArtifactError):
    """An artifact is truncated, damaged or of another schema."""


class IncompatibleArtifactError(ArtifactError):
    """An artifact was made for another machine, engine, shape or variant."""


class NumericalError(ZipLMError):
    """Non-finite activations or a factorization that failed at every damping."""


class EngineError(ZipLMError):
    """An inference engine refused a model, or its worker process died."""


class ParityError(ZipLMError):
    """Two forms of one model that must agree do not."""


class StorageError(ZipLMError):
    """A file could not be written."""


class FolderInUseError(StorageError):
    """Another run is in the folder."""


class TargetUnreachableError(ZipLMError):
    """No plan reaches the requested speedup."""

    exit_code = 3

    def __init__(self, message: str, largest_speedup: float) -> None:
        super().__init__(message)
        self.largest_speedup = largest_speedup
