"""Perplexities of methods at equal measured speedup, and how sure it is that one of them is the lower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Figure

from ziplm_deploy.tasks.outcomes import Outcomes

RESAMPLES = 1000
Row = dict[str, Any]


@dataclass(frozen=True)
class Windows:
    """What models make of the same windows of text.

    Attributes:
        scored: tokens of each window that count.
        log_likelihoods: of each window, in nats, by model; ``dense`` is among them.
    """

    scored: np.ndarray
    log_likelihoods: dict[str, np.ndarray]

    @classmethod
    def of_dense(cls, outcomes: Outcomes) -> Windows:
        """What the dense model makes of them; others are :meth:`added`."""
        return cls(outcomes["scored"], {"dense": outcomes["log_likelihood"]})

    @classmethod
    def joined(cls, parts: Sequence[dict[str, Any]]) -> Windows:
        """Of what :meth:`as_json` gave in several runs; raises ``ValueError`` if their windows are not the same."""
        scored = np.array(parts[0]["scored"])
        if any(part["scored"] != parts[0]["scored"] for part in parts):
            raise ValueError("expected runs on the same windows, found others; evaluate on the same text")
        found = {name: np.array(nats) for part in parts for name, nats in part["log_likelihoods"].items()}
        return cls(scored, found)

    def as_json(self) -> dict[str, Any]:
        """What a result file keeps; likelihoods to a thousandth of a nat."""
        nats = {name: [round(float(value), 3) for value in values] for name, values in self.log_likelihoods.items()}
        return {"scored": [int(value) for value in self.scored], "log_likelihoods": nats}

    def added(self, name: str, outcomes: Outcomes) -> float:
        """Keep what another model makes of the same windows; its perplexity."""
        self.log_likelihoods[name] = outcomes["log_likelihood"]
        return self.perplexity(name)

    def perplexity(self, name: str, chosen: Any = slice(None)) -> float:
        """Of a model on all windows, or on those ``chosen``."""
        return math.exp(-self.log_likelihoods[name][chosen].sum() / self.scored[chosen].sum())

    def interval(self, names: Sequence[str]) -> tuple[float, float]:
        """Where the geometric mean of models' perplexities lies with 95 % confidence: bootstrap over windows."""
        draws = _draws(len(self.scored), np.random.default_rng(0))
        found = [math.prod(self.perplexity(name, chosen) for name in names) ** (1 / len(names)) for chosen in draws]
        low, high = np.percentile(found, [2.5, 97.5])
        return float(low), float(high)


def _draws(n: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    return (generator.integers(n, size=n) for _ in range(RESAMPLES))


def log_perplexity_at(speedup: float, rows: Sequence[Row], dense: float, key: str) -> float | None:
    """Of a rival at a measured speedup, between its neighbouring models; None beyond its fastest one."""
    points = sorted((math.log(row["measured_speedup"]), math.log(row[key])) for row in rows if key in row)
    points = [(0.0, math.log(dense)), *points]
    if math.log(speedup) > points[-1][0]:
        return None
    return float(np.interp(math.log(speedup), *np.transpose(points)))


def cells_of(rows: Sequence[Row], dense: float, ours: str, rivals: Sequence[str], key: str) -> list[dict[str, Any]]:
    """Each of our models beside each rival of its seed: ``gain``, by what factor the rival's perplexity is higher at
    the same speed; None where the rival has no model as fast."""
    cells = []
    for row in (each for each in rows if each["method"] == ours and key in each):
        for rival in rivals:
            theirs = [each for each in rows if each["method"] == rival and each["seed"] == row["seed"]]
            found = log_perplexity_at(row["measured_speedup"], theirs, dense, key)
            gain = None if found is None else math.exp(found) / row[key]
            cells.append({"target": row["target"], "seed": row["seed"], "rival": rival, "gain": gain})
    return cells


def _won(cells: Sequence[dict[str, Any]]) -> float | None:
    known = [cell["gain"] for cell in cells if cell["gain"] is not None]
    return sum(gain > 1 for gain in known) / len(known) if known else None


def wins(rows: Sequence[Row], windows: Windows, ours: str, rivals: Sequence[str], key: str) -> Figure | None:
    """Share of cells in which ``ours`` has the lower perplexity; None: nothing to compare.

    The interval resamples the windows, the same for all models, and draws speedups as widely as their intervals are.
    """
    cells = cells_of(rows, windows.perplexity("dense"), ours, rivals, key)
    value = _won(cells)
    if value is None:
        return None
    generator = np.random.default_rng(0)
    shares = []
    for chosen in _draws(len(windows.scored), generator):
        drawn = [_drawn(row, windows, key, chosen, generator) for row in rows if key in row]
        share = _won(cells_of(drawn, windows.perplexity("dense", chosen), ours, rivals, key))
        shares += [] if share is None else [share]
    low, high = np.percentile(shares, [2.5, 97.5])
    n = sum(cell["gain"] is not None for cell in cells)
    return Figure(value, "", ">= 1", n, interval=(float(low), float(high)))


def _drawn(row: Row, windows: Windows, key: str, chosen: np.ndarray, generator: np.random.Generator) -> Row:
    """A row as it might have been measured, on other windows and in other processes."""
    log_spread = math.log(row["measured_high"] / row["measured_low"]) / 2 / 1.96
    speedup = row["measured_speedup"] * math.exp(log_spread * generator.standard_normal())
    return {**row, key: windows.perplexity(f"{row['name']} {key}", chosen), "measured_speedup": speedup}
