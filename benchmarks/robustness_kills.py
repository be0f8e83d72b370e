"""Runs that are killed and resumed, against undisturbed ones: the kills of ``robustness.py``.

Runs of tiny models are forked from a process that has imported everything, so that a run takes seconds on the one CPU
that it is given. Each gets
SIGKILL or SIGTERM, its whole process group does, at a random moment of a stage; stages take turns, kinds of which none
was killed yet come first. After it no worker
may live, and after SIGTERM, which ends a run in order, nothing unfinished may lie in its folder. Then the same command
is run to its end, and every file of the folder is compared with that of a run that nobody disturbed: plans, weights and
ONNX files byte by byte, scores and losses digit by digit. What holds a measurement (timings, the report, the manifest)
is left out. In pairs of runs in one folder, one must be refused and the other undisturbed.

A gradual run lets what it measured decide the next member's budget, so that no two of them need have the same plans.
Its measurements are replayed: every run, disturbed or not, times its files with workers and all, and is then given the
figures that the first undisturbed run measured of the files of the same names. All else is as it is for users.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import Figure
from robustness_recipes import MODES, kind_of, prepared
from robustness_runs import START, Running, command_in, fork, in_parallel, orphans, warm_up

DONE = (0, 3, 4)  # exit codes; 3, 4: a target was missed, or is undecided, as with tiny models on busy machines
DIED = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (143, -signal.SIGTERM),
}  # -SIGTERM: before the command began
MEASURED = ("benchmark*.json", "manifest.json", "report.json", "report.md", "README.md", "recipe.yaml")
MEASURED_FIELDS = {"seconds", "samples_per_second"}


@dataclass
class Case:
    """One disturbed run, and what was wrong with it."""

    index: int
    mode: str
    stage: str
    signal: str
    was_running: bool = False
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """A recipe, and what an undisturbed run of it made."""

    name: str
    root: Path
    seconds: Mapping[str, float]  # of the undisturbed run's stages

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def folder(self) -> Path:
        """What the undisturbed run made."""
        return self.root / "undisturbed" / "tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")


def measure(options: argparse.Namespace) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Kill runs and resume them; run pairs in one folder."""
    warm_up()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:1])  # sums of one thread and of two differ in their last digits
    root = Path(tempfile.mkdtemp(prefix="ziplm-kills-"))  # no TemporaryDirectory: forked runs would remove it
    jobs = [cpus[job % len(cpus)] for job in range(options.jobs)]
    try:
        seconds = in_parallel(jobs, [lambda mode=mode: _undisturbed(root, mode) for mode in options.modes])
        modes = [Mode(name, root / name, of_stages) for name, of_stages in zip(options.modes, seconds, strict=True)]
        of_name = {mode.name: mode for mode in modes}
        cases = _schedule(modes, options)
        rows = in_parallel(jobs, [lambda case=case: _killed(root, of_name[case.mode], case) for case in cases])
        turns = [(index, modes[index % len(modes)]) for index in range(options.pairs)]
        pairs = in_parallel(jobs, [lambda turn=turn: _pair(root, turn[1], turn[0], options) for turn in turns])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    kills = [row for row in rows if row["was_running"]]
    kinds = {kind_of(stage) for mode in modes for stage in mode.seconds}
    wrong = [row for row in rows if row["wrong"]]
    refused = sum(not pair["wrong"] for pair in pairs)
    for row in (*wrong, *(pair for pair in pairs if pair["wrong"])):
        print(json.dumps(row), file=sys.stderr)
    figures = {
        "kills": Figure(len(kills), "runs", ">= 60", n=len(rows)),
        "kill_differences": Figure(len(wrong), "runs", "<= 0", n=len(rows)),
        "stages_killed": Figure(
            len({kind_of(row["stage"]) for row in kills}), "kinds", f">= {len(kinds)}", n=len(rows)
        ),
        "pairs": Figure(refused, "pairs", f">= {len(pairs)}", n=len(pairs)),
    }
    return figures, [*rows, *pairs]


def _run(mode_name: str, recipe: Path, folder: Path, name: str, reference: Path | None, *more: str) -> Running:
    arguments = ["run", str(recipe), "--output-dir", str(folder), "--quiet", *more]
    return command_in(folder, name, arguments, reference if mode_name == "gradual" else None)


# --- cases ---


def _undisturbed(root: Path, mode: str) -> dict[str, float]:
    """Make the recipe of a mode, and run it twice: two undisturbed runs must not differ either. Seconds by stage."""
    folder = root / mode
    folder.mkdir()

    def prepare() -> None:
        raw = prepared(folder, mode)
        (folder / "table.yaml").write_text(json.dumps(raw), encoding="utf-8")  # JSON is YAML
        raw["profile"]["table"] = str(folder / "tables" / "tiny" / "profile.json")
        (folder / "recipe.yaml").write_text(json.dumps(raw), encoding="utf-8")

    _expect(fork(folder, folder / "prepare.log", prepare), (0,))
    table = ["profile", str(folder / "table.yaml"), "--output-dir", str(folder / "tables"), "--quiet"]
    _expect(command_in(folder / "tables", "profile", table), (0,))
    recipe, made = folder / "recipe.yaml", folder / "undisturbed" / "tiny"
    _expect(_run("", recipe, made.parent, "run", None), DONE)
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    seconds = {stage: manifest["seconds"][stage] for stage in manifest["stages"]}
    again = folder / "again"
    _expect(_run(mode, recipe, again, "run", made), DONE)
    if differing := _differences(made, again / "tiny"):
        raise SystemExit(f"expected two undisturbed runs of {mode} to be alike, found other {', '.join(differing)}")
    print(f"{mode}: {len(seconds)} stages, {sum(seconds.values()):.0f} s undisturbed", file=sys.stderr)
    return {START: 0.5, **seconds}


def _expect(running: Running, codes: tuple[int, ...]) -> None:
    for _ in running.stages:
        pass
    code = running.wait()
    if code not in codes:
        raise SystemExit(f"expected exit code {codes}, found {code}:\n{running.log.read_text(encoding='utf-8')}")


def _schedule(modes: list[Mode], options: argparse.Namespace) -> list[Case]:
    """Cases, whose modes, stages and signals take turns; one of every kind of stage before a second of any."""
    order = random.Random(options.seed)
    turns = [(mode.name, order.sample(sorted(mode.seconds), len(mode.seconds))) for mode in modes]
    longest = max(len(stages) for _, stages in turns)
    every = [(mode, stages[place]) for place in range(longest) for mode, stages in turns if place < len(stages)]
    seen: set[str] = set()
    is_new = [not (kind_of(stage) in seen or seen.add(kind_of(stage))) for _, stage in every]
    ordered = [case for wanted in (True, False) for case, new in zip(every, is_new, strict=True) if new is wanted]
    signals = itertools.cycle(["SIGKILL", "SIGTERM", "SIGKILL"])
    cases = zip(range(options.kills), itertools.cycle(ordered), signals, strict=False)
    return [Case(index, mode, stage, signal_name) for index, (mode, stage), signal_name in cases]


def _killed(root: Path, mode: Mode, case: Case) -> dict[str, Any]:
    """Disturb a run, resume it, and compare."""
    folder, moment = root / f"case-{case.index}", random.Random(case.index)
    number = signal.Signals[case.signal]
    running = _run(mode.name, mode.recipe, folder, "killed", mode.folder)
    running.wait_for(case.stage)
    time.sleep(moment.uniform(0, mode.seconds[case.stage]))
    case.was_running = running.is_running()
    os.killpg(running.pid, number)
    code = running.wait()
    if case.was_running and code not in DIED[number]:
        case.wrong.append(f"exit code {code} after {case.signal}")
    if number == signal.SIGTERM and (left := _unfinished(folder)):
        case.wrong.append(f"left after SIGTERM: {', '.join(left)}")
    if alive := orphans(folder):
        case.wrong.append(f"{alive} processes alive after 5 s")
    resumed = _run(mode.name, mode.recipe, folder, "resumed", mode.folder)
    try:
        _expect(resumed, DONE)
    except (SystemExit, TimeoutError) as error:
        case.wrong.append(str(error))
    case.wrong += [f"other {name}" for name in _differences(mode.folder, folder / "tiny")]
    case.wrong += [f"left: {name}" for name in _unfinished(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{case.index}: {case.mode}, {case.stage}, {case.signal}: {case.wrong or 'alike'}", file=sys.stderr)
    return {"part": "kill", **asdict(case)}


def _pair(root: Path, mode: Mode, index: int, options: argparse.Namespace) -> dict[str, Any]:
    """Two runs in one folder, at most seconds apart; every other time the second one has another seed."""
    folder, wrong = root / f"pair-{index}", []
    apart = random.Random(f"{options.seed} {index}").uniform(0.5, 5.0)
    first = _run(mode.name, mode.recipe, folder, "first", mode.folder)
    time.sleep(apart)
    second = _run(mode.name, mode.recipe, folder, "second", mode.folder, *(["--seed", "1"] if index % 2 else []))
    codes = second.wait(), first.wait()
    said = second.log.read_text(encoding="utf-8")
    if codes[0] != 1 or f"process {first.pid} on " not in said:
        wrong.append(f"the second ended with {codes[0]}: {said[-300:]}")
    if codes[1] not in DONE:
        wrong.append(f"the first ended with {codes[1]}")
    wrong += [f"other {name}" for name in _differences(mode.folder, folder / "tiny")]
    return {"part": "pair", "index": index, "mode": mode.name, "seconds_apart": round(apart, 1), "wrong": wrong}


# --- what is compared ---


def _differences(undisturbed: Path, found: Path) -> list[str]:
    """Files that are not the same in both folders."""
    one, other = _contents(undisturbed), _contents(found)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _contents(folder: Path) -> dict[str, Any]:
    """What every file says, but for what was measured."""
    paths = {path for path in folder.rglob("*") if path.is_file()}
    measured = {path for pattern in MEASURED for path in folder.rglob(pattern)}
    return {str(path.relative_to(folder)): _content(path) for path in sorted(paths - measured)}


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _unmeasured(json.loads(path.read_text(encoding="utf-8")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unmeasured(item) for name, item in value.items() if name not in MEASURED_FIELDS}
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value


def _unfinished(folder: Path) -> list[str]:
    """Files and folders that should not outlast a run: in its own folder, and in that for temporary ones."""
    own = [path for path in (folder / "tiny").rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    scratch = list((folder / "tmpdir").glob("*/process-*")) + list((folder / "tmpdir").glob("ziplm-*-*-*"))
    return [str(path.relative_to(folder)) for path in (*own, *scratch)]
