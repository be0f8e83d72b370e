"""The accuracy budget of an INT8 file: as few linears spared from INT8 as hold it, the most sensitive ones first.

What is spared becomes weight-only 8-bit where the settings say so, and float32 where that does not hold the budget.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ziplm_deploy.compression.int8.judged import Judged, check_score, holds_budget
from ziplm_deploy.compression.int8.sensitivity import SensitivityRow
from ziplm_deploy.errors import UsageError
from ziplm_deploy.recipe import Int8Config

Fallback = Literal["float32", "weight-only-8"]


@dataclass(frozen=True)
class Spared:
    """Linears that do not compute in INT8, and what they are in its place."""

    names: tuple[str, ...] = ()
    form: Fallback = "float32"


Write = Callable[[Spared, Path], None]
Judge = Callable[[Path], float]  # score of a file, the higher, the better


@dataclass(frozen=True)
class SparedChoice(Judged):
    """Which linears are spared from INT8, and whether that holds the budget; ``tried`` counts those spared.

    If the budget does not hold, ``spared`` is what scored best, with the fewest linears.
    """

    spared: Spared

    @property
    def fp32_linears(self) -> tuple[str, ...]:
        """Linears that stay float32."""
        return self.spared.names if self.spared.form == "float32" else ()


def within_budget(
    destination: Path,
    write: Write,
    judge: Judge,
    ranking: Sequence[SensitivityRow],
    reference_score: float,
    config: Int8Config,
    tried: Callable[[Spared, float], None] | None = None,
) -> SparedChoice:
    """Write ``destination`` with as few linears spared from INT8 as the budget needs, see :func:`spare_linears`.

    Candidates lie in a folder beside ``destination`` until the chosen one takes its place; nothing else is left.

    Args:
        write: writes a candidate; called once for each that is tried.
        judge: called once for each candidate, after it was written.
        ranking: the most sensitive first, as ``rank_linears`` returns them.
        reference_score: of the model before INT8, by the same measure.
        tried: called with (what was spared, score) after each candidate.

    Raises:
        UsageError: no ranking.  NumericalError: a score is not finite.
    """
    with tempfile.TemporaryDirectory(prefix=".candidates-", suffix=".tmp", dir=destination.parent) as folder:
        candidates: dict[Spared, Path] = {}

        def evaluate(spared: Spared) -> float:
            candidates[spared] = Path(folder) / f"candidate-{len(candidates)}.onnx"
            write(spared, candidates[spared])
            score = judge(candidates[spared])
            if tried is not None:
                tried(spared, score)
            return score

        choice = spare_linears(ranking, evaluate, reference_score, config)
        candidates[choice.spared].replace(destination)
    return choice


def spare_linears(
    ranking: Sequence[SensitivityRow],
    evaluate: Callable[[Spared], float],
    reference_score: float,
    config: Int8Config,
) -> SparedChoice:
    """Spare 0, 1, 2, 4, … of the most sensitive linears until the loss is within ``config.max_loss``.

    The last number tried is ``config.max_fp32_share`` of the linears, or all but one. They become what
    ``config.fallback`` says; if the last number is not enough as weight-only, it is tried in float32, too.

    Args:
        ranking: the most sensitive first, as ``rank_linears`` returns them.
        evaluate: score, higher is better, of the quantized file with these linears spared.
        reference_score: of the model before INT8.

    Raises:
        UsageError: no ranking.  NumericalError: a score is not finite.
    """
    if not ranking:
        raise UsageError("expected linears to choose from, found none; rank them by their sensitivity first")
    check_score("of the model before INT8", reference_score)
    tried: list[tuple[Spared, float]] = []

    def choice(spared: Spared, score: float, holds: bool) -> SparedChoice:
        counts = tuple((len(each.names), found) for each, found in tried)
        return SparedChoice(score, reference_score, counts, holds, spared=spared)

    for spared in _candidates(tuple(row.name for row in ranking), config):
        score = evaluate(spared)
        check_score(f"with {len(spared.names)} linear(s) in {spared.form}", score)
        tried.append((spared, score))
        if holds_budget(score, reference_score, config.max_loss):
            return choice(spared, score, holds=True)
    best, score = max(tried, key=lambda item: (item[1], -len(item[0].names)))
    return choice(best, score, holds=False)


def _candidates(names: tuple[str, ...], config: Int8Config) -> Iterator[Spared]:
    largest = min(int(config.max_fp32_share * len(names)), len(names) - 1)
    form: Fallback = config.fallback or "float32"
    for count in _counts(largest):
        yield Spared(names[:count], form if count else "float32")
    if largest and form != "float32":
        yield Spared(names[:largest])


def _counts(largest: int) -> Iterator[int]:
    """0, 1, 2, 4, … and ``largest``."""
    yield 0
    count = 1
    while count < largest:
        yield count
        count *= 2
    if largest:
        yield largest
