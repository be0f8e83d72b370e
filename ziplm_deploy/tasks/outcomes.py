"""What a model did on every example of an evaluation set: enough to compute its score on any choice of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import model_validator
from typing_extensions import Self

from ziplm_deploy.artifacts import Artifact, file_hash
from ziplm_deploy.errors import CorruptArtifactError, DataError

Values = list[int] | list[float] | list[list[int]] | list[list[float]]


@dataclass(frozen=True)
class Outcomes:
    """Answers of one model, example by example.

    Raises:
        ValueError: arrays of different lengths, or none.
    """

    arrays: Mapping[str, npt.NDArray[np.int64] | npt.NDArray[np.float64]]  # [examples] or [examples, names]
    names: tuple[str, ...] = ()  # what the second axis stands for, e.g. types of entities

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.arrays.values()}
        if len(lengths) != 1:
            raise ValueError(f"expected arrays over the same examples, found lengths {sorted(lengths)}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, name: str) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        return self.arrays[name]

    def take(self, examples: npt.NDArray[np.int64]) -> Outcomes:
        """The outcomes of some examples, given by their indices."""
        return dataclasses.replace(self, arrays={name: values[examples] for name, values in self.arrays.items()})

    def followed_by(self, others: Outcomes, *, reverse: bool = False) -> Outcomes:
        """These examples and then others, of the same arrays, perhaps in the reverse order."""
        step = -1 if reverse else 1
        arrays = {name: np.concatenate([values, others[name][::step]]) for name, values in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def save(self, path: Path) -> str:
        """Write them as JSON, atomically, and return the file's hash.

        Raises:
            StorageError: they cannot be written.  DataError: they are more than a file may hold.
        """
        arrays = {name: values.tolist() for name, values in self.arrays.items()}
        _OutcomesFile(arrays=arrays, names=list(self.names)).save(path)
        if path.stat().st_size > _OutcomesFile.MAX_BYTES:
            path.unlink()
            raise DataError(
                f"expected answers to all evaluation examples within {_OutcomesFile.MAX_BYTES >> 20} MiB, found more, "
                f"of {len(self):,} examples; evaluate fewer: data.n_evaluation"
            )
        return file_hash(path)

    @classmethod
    def load(cls, path: Path, expected_hash: str) -> Outcomes:
        """Read what :meth:`save` wrote.

        Raises:
            CorruptArtifactError: missing, damaged, of another schema, or not the file with this hash.
        """
        found = _OutcomesFile.load(path)
        if file_hash(path) != expected_hash:
            raise CorruptArtifactError(
                f"expected the outcomes that the scores beside them were computed from in {path}, found others; "
                "delete it and run the same command again"
            )
        return cls({name: np.array(values) for name, values in found.arrays.items()}, tuple(found.names))


class _OutcomesFile(Artifact):
    KIND: ClassVar[str] = "record_of_outcomes"
    MAX_BYTES: ClassVar[int] = 1 << 30  # 100,000 texts of 1,000 classes; a number of them takes three bytes
    INDENT: ClassVar[int | None] = None

    arrays: dict[str, Values]
    names: list[str]

    @model_validator(mode="after")
    def _one_value_an_example(self) -> Self:
        shapes = {np.array(values).shape for values in self.arrays.values()}  # ragged lists raise ValueError
        if len({shape[0] for shape in shapes}) != 1:
            raise ValueError(f"expected one value an example in every array, found shapes {sorted(shapes)}")
        return self


def halves(n_examples: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Two halves of an evaluation set, as ascending indices: one to choose by, and one to report the choice on.

    What is chosen because of its score has a score that is too good by what luck gave it; on other examples luck is
    drawn anew. The halves are disjoint, depend on nothing but the arguments, and are never read in the files' order.
    """
    order = np.random.default_rng(seed).permutation(n_examples)
    chosen_by = n_examples // 2
    return np.sort(order[:chosen_by]), np.sort(order[chosen_by:])
