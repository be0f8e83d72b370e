"""What every benchmark program shares: figures, and the one shape of the result files.

Run a program from the repository's root, ``python benchmarks/additivity.py``; it writes a file in
``benchmarks/results``.
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # programs run from a checkout, installed or not
    sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"
PENDING = "No result is committed yet."
PACKAGES = ("torch", "onnxruntime", "transformers", "onnx", "numpy")


@dataclass(frozen=True)
class Figure:
    """A number that an issue asks for: value, unit, goal such as ``<= 5``, sample count and spread (low, high).

    ``interval``: where the value is known to lie with 95 % confidence; the goal is then decided by all of it.
    """

    value: float
    unit: str
    goal: str
    n: int
    spread: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        return verdict_of(self.as_json())

    @property
    def met(self) -> bool | None:
        """Whether the goal holds for the value; None where the goal is no comparison with a number."""
        return goal_met(self.value, self.goal)

    def as_json(self) -> dict[str, Any]:
        spread = None if self.spread is None else list(self.spread)
        interval = {} if self.interval is None else {"interval": list(self.interval)}
        return {"value": self.value, "unit": self.unit, "goal": self.goal, "n": self.n, "spread": spread, **interval}


SAMPLED_UNITS = ("%", "x", "points")  # of figures that another sample of examples or processes would have left other


def goal_met(value: float, goal: str) -> bool | None:
    """``goal_met(3.1, "<= 5")`` is True; None where ``goal`` is neither a comparison with a number nor ``2 to 4``."""
    low, to, high = goal.partition(" to ")
    if to:
        return float(low) <= value <= float(high)
    sign, _, limit_text = goal.strip().partition(" ")
    try:
        limit = float(limit_text)
    except ValueError:
        return None
    comparisons = {"<=": value <= limit, "<": value < limit, ">=": value >= limit, ">": value > limit}
    return comparisons.get(sign)


def write_result(
    name: str,
    figures: Mapping[str, Figure],
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    path: Path | None = None,
) -> Path:
    """Write ``benchmarks/results/NAME.json`` (or ``path``) atomically and print its figures; returns the path."""
    from ziplm_deploy.artifacts import write_text

    result = {
        "name": name,
        "command": shlex.join(["python", _relative(Path(sys.argv[0])), *map(_anonymous, sys.argv[1:])]),
        **provenance(),
        "settings": dict(settings),
        "figures": {key: figure.as_json() for key, figure in figures.items()},
        "rows": [dict(row) for row in rows],
    }
    path = path or RESULTS / f"{name}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    for key, figure in figures.items():
        goal = f" (goal {figure.goal})" if figure.goal else ""
        print(f"{key}: {figure.value:.4g} {figure.unit}{goal} {figure.verdict}")
    print(f"wrote {_relative(path)}")
    return path


def provenance() -> dict[str, Any]:
    """When, from which sources, on what and with what something was measured."""
    from ziplm_deploy.machine.info import machine_info, versions

    machine = machine_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": machine.cpu_model,
            "isa": list(machine.isa_flags),
            "cores": machine.usable_cores,
            "memory_bytes": machine.memory_bytes,
        },
        "versions": versions(PACKAGES),
    }


def verdict_of(figure: Mapping[str, Any]) -> str:
    """``met``, ``MISSED`` or, where the interval holds a limit of the goal, ``undecided``; empty without a goal.

    A share or a ratio that has no interval is judged by its value, which is then said.
    """
    goal, interval = figure["goal"], figure.get("interval")
    met = {goal_met(bound, goal) for bound in interval or [figure["value"]]}
    if interval and " to " in goal and met == {False}:
        least, _, most = goal.partition(" to ")
        if interval[0] < float(least) and interval[1] > float(most):
            return "undecided"
    verdict = "undecided" if len(met) > 1 else {True: "met", False: "MISSED", None: ""}[met.pop()]
    return f"{verdict}, no interval" if verdict and not interval and figure["unit"] in SAMPLED_UNITS else verdict


def commit() -> str:
    """Hash of the checkout, with ``+changes`` if tracked files differ from it; ``unknown`` outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def grouped_by_length() -> dict[str, Any]:
    """Settings of a stock Trainer that put examples of like length into a batch; transformers 5 renamed them."""
    import transformers

    if "group_by_length" in inspect.signature(transformers.TrainingArguments).parameters:
        return {"group_by_length": True}
    return {"train_sampling_strategy": "group_by_length"}


def load_average() -> float:
    """Processes that wanted a CPU over the last minute: a measurement on a busy machine must show it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _anonymous(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


def _relative(path: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name


def of_result(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[], str]]:
    """Makes a text of the committed result of a program, or says that there is none yet."""

    def wrap(text_of: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
        def text() -> str:
            path = RESULTS / f"{name}.json"
            return text_of(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else PENDING

        return text

    return wrap


# The widest arithmetic of a CPU decides how INT8 does there: what a row is called after, best first.
_ARITHMETIC = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def cpu_text(machine: Mapping[str, Any]) -> str:
    """A CPU with the widest arithmetic that it has, as tables name it."""
    kinds = [name for flag, name in _ARITHMETIC.items() if flag in machine["isa"]]
    return f"{machine['cpu']} ({kinds[0]})" if kinds else str(machine["cpu"])


def place_text(result: Mapping[str, Any]) -> str:
    """Where and when a result was measured, as the end of a caption."""
    return f"{cpu_text(result['machine'])}, {result['date'][:10]}."


def interval_text(speedup: float, low: float, high: float) -> str:
    """A measured speedup as tables have it."""
    return f"{speedup:.2f}x [{low:.2f}, {high:.2f}]"
