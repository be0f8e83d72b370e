"""Which form each linear of a causal language model gets: by what it loses, and by the milliseconds that it takes.

A linear has four forms (:data:`FORMS`). Each costs milliseconds of a request and changes the model's answers; both were
measured. Losses of linears are taken to add up, which they do while they are small; what the chosen file loses is
measured again, as a whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from exporters.names import HEAD
from ziplm_deploy.compression.int8.judged import Judged, check_score, holds_budget
from ziplm_deploy.errors import UsageError

Form = Literal["float32", "int8", "weight-only-8", "weight-only-4"]
FORMS: tuple[Form, ...] = get_args(Form)
BITS: dict[Form, int] = {"weight-only-8": 8, "weight-only-4": 4}
BYTES: dict[Form, float] = {
    "float32": 4,
    "int8": 1,
    "weight-only-8": 1.125,
    "weight-only-4": 0.625,
}  # a weight, scales included
MOST_TRIED = 8
GUESSES = 3  # tries after which the slowest is looked at, if none has held the budget
NEAR = 0.005  # share of the milliseconds of linears that are worth no further try


@dataclass(frozen=True)
class Cost:
    """What a linear costs in one form: milliseconds of a request, and divergence of the model's answers."""

    ms: float
    divergence: float


@dataclass(frozen=True)
class Mixture:
    """The form of every linear by name, with the milliseconds and the divergence of all together."""

    forms: Mapping[str, Form]
    ms: float
    divergence: float = 0.0

    def named(self, form: Form) -> tuple[str, ...]:
        """Linears of this form."""
        return tuple(name for name, chosen in self.forms.items() if chosen == form)


@dataclass(frozen=True)
class MixtureChoice(Judged):
    """The fastest mixture found within the budget, or the best-scoring one where none holds it; ``tried`` counts
    linears in float32."""

    mixture: Mixture

    @property
    def fp32_linears(self) -> tuple[str, ...]:
        """Linears that stay float32."""
        return self.mixture.named("float32")


def mixtures(costs: Mapping[str, Mapping[Form, Cost]], max_fp32_share: float) -> list[Mixture]:
    """Mixtures from the fastest on; each gives one linear another form, that which saves most divergence a millisecond.

    None that is as fast has less divergence, until as many linears are float32 as ``max_fp32_share`` allows, and all
    but one at most; the others then go on to the remaining forms.

    Raises:
        UsageError: no linears.
    """
    if not costs:
        raise UsageError("expected linears to choose forms for, found none; use the float32 file")
    most = min(int(max_fp32_share * len(costs)), len(costs) - 1)
    allowed = _with_few_in_float32(costs, most)
    paths = {name: _hull(of_forms) for name, of_forms in allowed.items()}
    forms = {name: path[0][0] for name, path in paths.items()}
    found, is_full = [_mixture(forms, costs)], False
    while True:
        if not is_full and list(forms.values()).count("float32") >= most:
            is_full = True
            paths = {name: _onwards(forms[name], of_forms) for name, of_forms in costs.items()}
        steps = {name: _saves(path[0][1], path[1][1]) for name, path in paths.items() if len(path) > 1}
        if not steps:
            return found
        name = max(steps, key=lambda each: steps[each])
        paths[name] = paths[name][1:]
        forms[name] = paths[name][0][0]
        found.append(_mixture(forms, costs))


def _with_few_in_float32(costs: Mapping[str, Mapping[Form, Cost]], most: int) -> Mapping[str, Mapping[Form, Cost]]:
    """Costs without float32 where it is the fastest form of more than ``most`` linears, and gains least."""
    others = {name: _without_float32(of_forms) for name, of_forms in costs.items()}
    gains = {name: min(cost.ms for cost in others[name].values()) - of["float32"].ms for name, of in costs.items()}
    fastest = sorted((name for name, gain in gains.items() if gain >= 0), key=lambda name: -gains[name])
    return {**costs, **{name: others[name] for name in fastest[most:]}}


def _without_float32(of_forms: Mapping[Form, Cost]) -> dict[Form, Cost]:
    return {form: cost for form, cost in of_forms.items() if form != "float32"}


def _onwards(form: Form, of_forms: Mapping[Form, Cost]) -> list[tuple[Form, Cost]]:
    """The path of a linear from the form that it has, when no more linears may become float32."""
    if form == "float32":
        return [(form, of_forms[form])]
    now = of_forms[form]
    slower = {other: cost for other, cost in _without_float32(of_forms).items() if cost.ms > now.ms}
    return _hull({form: now, **slower})


def _mixture(forms: Mapping[str, Form], costs: Mapping[str, Mapping[Form, Cost]]) -> Mixture:
    chosen = [costs[name][form] for name, form in forms.items()]
    return Mixture(dict(forms), sum(cost.ms for cost in chosen), sum(cost.divergence for cost in chosen))


def _hull(of_forms: Mapping[Form, Cost]) -> list[tuple[Form, Cost]]:
    """Forms of a linear that no other one, nor a mean of two, beats in both; the fastest first."""
    hull: list[tuple[Form, Cost]] = []
    for form, cost in sorted(of_forms.items(), key=lambda item: (item[1].ms, item[1].divergence)):
        if hull and cost.divergence >= hull[-1][1].divergence:
            continue
        while len(hull) > 1 and _saves(hull[-2][1], hull[-1][1]) <= _saves(hull[-2][1], cost):
            hull.pop()
        hull.append((form, cost))
    return hull


def _saves(before: Cost, after: Cost) -> float:
    """Divergence that a millisecond more saves."""
    return (before.divergence - after.divergence) / max(after.ms - before.ms, 1e-9)


def fastest_within(
    destination: Path,
    write: Callable[[Mixture, Path], None],
    judge: Callable[[Path], float],
    ladder: Sequence[Mixture],
    reference_score: float,
    max_loss: float,
    tried: Callable[[Mixture, float], None] | None = None,
) -> MixtureChoice:
    """Write ``destination`` with the fastest mixture of ``ladder`` that loses at most ``max_loss`` of the score.

    The fastest is tried, then those at which the loss is likely to meet the budget: by the divergence of the mixtures,
    scaled as those before have lost, and by turns what halves the milliseconds between one that holds and one that does
    not; until little is left between them, or :data:`MOST_TRIED` are. Candidates lie beside ``destination`` until one
    takes its place.

    Args:
        write: writes a candidate.
        judge: score of a file, the higher, the better.
        tried: called with (mixture, score) after each candidate.

    Raises:
        NumericalError: a score is not finite.
    """
    check_score("of the model before INT8", reference_score)
    found: dict[int, tuple[float, Path]] = {}
    with tempfile.TemporaryDirectory(prefix=".candidates-", suffix=".tmp", dir=destination.parent) as folder:

        def holds(place: int) -> bool:
            path = Path(folder) / f"candidate-{place}.onnx"
            write(ladder[place], path)
            found[place] = judge(path), path
            check_score(
                f"of a mixture with {len(ladder[place].named('float32'))} linear(s) in float32", found[place][0]
            )
            if tried is not None:
                tried(ladder[place], found[place][0])
            return holds_budget(found[place][0], reference_score, max_loss)

        low, high = -1, len(ladder)  # the slowest that does not hold, the fastest that does; neither is tried yet
        while high - low > 1 and len(found) < MOST_TRIED:
            if high < len(ladder) and ladder[high].ms - ladder[low + 1].ms < NEAR * ladder[high].ms:
                break
            whole = abs(reference_score) or 1.0
            losses = {place: (reference_score - score) / whole for place, (score, _) in found.items()}
            place = _next(ladder, low, high, losses, max_loss)
            low, high = (low, place) if holds(place) else (place, high)
        best = high if high in found else max(found, key=lambda place: (found[place][0], -place))
        found[best][1].replace(destination)
    counts = tuple((len(ladder[place].named("float32")), score) for place, (score, _) in found.items())
    return MixtureChoice(found[best][0], reference_score, counts, high in found, mixture=ladder[best])


def that_fit(
    ladder: Sequence[Mixture], n_weights: Mapping[str, int], most_bytes: float, embedding_bytes: float = 0.0
) -> list[Mixture]:
    """Mixtures whose linears take at most so many bytes in a file; the fastest one where none does.

    ``embedding_bytes``: of the embedding that a tied head shares in float32, and leaves behind in any other form.
    """

    def size(mixture: Mixture) -> float:
        left = embedding_bytes if mixture.forms.get(HEAD, "float32") != "float32" else 0.0
        return left + sum(BYTES[form] * n_weights[name] for name, form in mixture.forms.items())

    return [mixture for mixture in ladder if size(mixture) <= most_bytes] or [ladder[0]]


def _next(ladder: Sequence[Mixture], low: int, high: int, losses: Mapping[int, float], max_loss: float) -> int:
    """The rung strictly between two to try next; ``losses``: relative ones of those that were tried."""
    if not losses:
        return 0
    if high == len(ladder) and len(losses) == GUESSES:  # a part of the loss may be of no linear
        return len(ladder) - 1
    near = min(losses, key=lambda place: abs(losses[place] - max_loss))
    if high < len(ladder) and len(losses) % 2:
        return _between(ladder, low, high)
    if losses[near] <= 0 or ladder[near].divergence <= 0:  # nothing says how much a divergence loses
        return _between(ladder, low, high) if high < len(ladder) else len(ladder) - 1
    allowed = max_loss * ladder[near].divergence / losses[near]
    inside = range(low + 1, high)
    return next((place for place in inside if ladder[place].divergence <= allowed), inside[-1])


def _between(ladder: Sequence[Mixture], low: int, high: int) -> int:
    """The rung strictly between two whose milliseconds are nearest to the middle of theirs."""
    middle = (ladder[low].ms + ladder[high].ms) / 2
    return min(range(low + 1, high), key=lambda place: abs(ladder[place].ms - middle))
