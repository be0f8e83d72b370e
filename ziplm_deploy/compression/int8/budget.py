"""The accuracy budget of an INT8 file: as few linears in float32 as hold it, the most sensitive ones first."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ziplm_deploy.compression.int8.sensitivity import SensitivityRow
from ziplm_deploy.errors import NumericalError, UsageError
from ziplm_deploy.recipe import Int8Config

Write = Callable[[tuple[str, ...], Path], None]  # the file with these linears in float32
Judge = Callable[[Path], float]  # score of a file, the higher, the better


@dataclass(frozen=True)
class Fp32Choice:
    """Which linears stay float32, and whether that holds the budget.

    ``tried``: (number kept, score) in the order of the search. If the budget does not hold, ``kept`` is what scored
    best, with the fewest linears.
    """

    kept: tuple[str, ...]
    score: float
    reference_score: float
    tried: tuple[tuple[int, float], ...]
    within_budget: bool


def within_budget(
    destination: Path,
    write: Write,
    judge: Judge,
    ranking: Sequence[SensitivityRow],
    reference_score: float,
    config: Int8Config,
    tried: Callable[[int, float], None] | None = None,
) -> Fp32Choice:
    """Write ``destination`` with as few linears in float32 as the budget needs, see :func:`keep_in_fp32`.

    Candidates lie in a folder beside ``destination`` until the chosen one takes its place; nothing else is left.

    Args:
        write: writes a candidate; called once for each that is tried.
        judge: called once for each candidate, after it was written.
        ranking: the most sensitive first, as ``rank_linears`` returns them.
        reference_score: of the model before INT8, by the same measure.
        tried: called with (linears in float32, score) after each candidate.

    Raises:
        UsageError: no ranking.  NumericalError: a score is not finite.
    """
    with tempfile.TemporaryDirectory(prefix=".candidates-", suffix=".tmp", dir=destination.parent) as folder:
        candidates: dict[tuple[str, ...], Path] = {}

        def evaluate(kept: tuple[str, ...]) -> float:
            candidates[kept] = Path(folder) / f"candidate-{len(candidates)}.onnx"
            write(kept, candidates[kept])
            score = judge(candidates[kept])
            if tried is not None:
                tried(len(kept), score)
            return score

        choice = keep_in_fp32(ranking, evaluate, reference_score, config)
        candidates[choice.kept].replace(destination)
    return choice


def keep_in_fp32(
    ranking: Sequence[SensitivityRow],
    evaluate: Callable[[tuple[str, ...]], float],
    reference_score: float,
    config: Int8Config,
) -> Fp32Choice:
    """Leave 0, 1, 2, 4, … of the most sensitive linears in float32 until the loss is within ``config.max_loss``.

    The last number tried is ``config.max_fp32_share`` of the linears, or all but one.

    Args:
        ranking: the most sensitive first, as ``rank_linears`` returns them.
        evaluate: score, higher is better, of the quantized file with these linears in float32.
        reference_score: of the model before INT8.

    Raises:
        UsageError: no ranking.  NumericalError: a score is not finite.
    """
    if not ranking:
        raise UsageError("expected linears to choose from, found none; rank them by their sensitivity first")
    _check_score("of the model before INT8", reference_score)
    names = tuple(row.name for row in ranking)
    tried: list[tuple[int, float]] = []
    for count in _counts(min(int(config.max_fp32_share * len(names)), len(names) - 1)):
        score = evaluate(names[:count])
        _check_score(f"with {count} linear(s) in float32", score)
        tried.append((count, score))
        if reference_score - score <= config.max_loss * abs(reference_score):
            return Fp32Choice(names[:count], score, reference_score, tuple(tried), within_budget=True)
    count, score = max(tried, key=lambda item: (item[1], -item[0]))
    return Fp32Choice(names[:count], score, reference_score, tuple(tried), within_budget=False)


def _check_score(what: str, score: float) -> None:
    if not math.isfinite(score):
        raise NumericalError(f"expected a finite score {what}, found {score}; check the calibration data")


def _counts(largest: int) -> Iterator[int]:
    """0, 1, 2, 4, … and ``largest``."""
    yield 0
    count = 1
    while count < largest:
        yield count
        count *= 2
    if largest:
        yield largest
