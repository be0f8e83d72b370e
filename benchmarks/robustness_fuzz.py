"""Fuzzing of every reader of files from anywhere: thousands of damaged files, each read as a user would.

A case passes if its file is taken, or refused by a :class:`ZipLMError` with a message of readable length. It fails if
anything else is raised, if code of a folder runs, after 30 s, or above 2 GB of memory. Cases run in processes that are
forked from one that has imported everything, so that thousands take minutes; every case can be repeated by its name:
``--fuzz-case member:17`` shows its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import Figure
from robustness_corpus import make_corpus
from robustness_readers import READERS, WORKERS, damaged_copy

HANG_SECONDS = 30.0
MAX_MEMORY_BYTES = 2 << 30
MAX_MESSAGE = 20_000  # characters
ADDRESS_SPACE_BYTES = 6 << 30  # beyond what a process begins with: a failure must not take the machine with it
CASES_OF_A_PROCESS = 25
LANES = 2  # processes at a time
PASSED = ("taken", "refused")


class Case(NamedTuple):
    """One damaged file: the reader that gets it, and the number that decides the damage."""

    reader: str
    index: int

    def __str__(self) -> str:
        return f"{self.reader}:{self.index}"


class Outcome(NamedTuple):
    case: Case
    what: str  # "taken", "refused", or what failed
    detail: str
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fuzz-cases", type=int, default=2400, help="damaged files")
    parser.add_argument("--fuzz-case", metavar="READER:NUMBER", help="repeat one case and show its traceback")


def measure(options: argparse.Namespace) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Figures and rows of the result file."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        corpus = Path(folder) / "corpus"
        prepare(corpus)
        if options.fuzz_case is not None:
            _repeat(options.fuzz_case, corpus, options.seed)
        outcomes = run_cases(cases(options.fuzz_cases), corpus, options.seed)
    failures = [outcome for outcome in outcomes if outcome.what not in PASSED]
    peak = max(outcome.peak_bytes for outcome in outcomes)
    rows = [
        {
            **{"part": "fuzz", "reader": name, "cases": sum(of_reader.values())},
            **{what: of_reader[what] for what in PASSED},
            "failures": sum(count for what, count in of_reader.items() if what not in PASSED),
        }
        for name in (reader.__name__ for reader in READERS)
        if (of_reader := Counter(outcome.what for outcome in outcomes if outcome.case.reader == name))
    ]
    rows += [
        {"part": "fuzz", "case": str(outcome.case), "failed": outcome.what, "detail": outcome.detail[-2000:]}
        for outcome in failures
    ]
    for row in rows:
        print(json.dumps(row))
    print(f"{len(outcomes)} cases in {time.monotonic() - began:.0f} s")
    n = len(outcomes)
    return {
        "fuzz_cases": Figure(n, "", ">= 2000", n),
        "fuzz_failures": Figure(len(failures), "", "<= 0", n),
        "fuzz_peak_memory_bytes": Figure(peak, "bytes", f"<= {MAX_MEMORY_BYTES}", n),
    }, rows


def prepare(corpus: Path) -> None:
    """Import everything once, and write good files."""
    import onnxruntime  # noqa: F401
    import torch
    import transformers

    import ziplm_deploy.cli.commands
    import ziplm_deploy.run.folder  # noqa: F401

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # threads do not survive a fork
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    corpus.mkdir(parents=True)
    make_corpus(corpus)


def cases(count: int) -> list[Case]:
    """So many cases, shared among the readers, those of one reader after another."""
    total = sum(READERS.values())
    found = [
        Case(reader.__name__, index) for reader, share in READERS.items() for index in range(-(-count * share // total))
    ]
    return found[:count] if count < total else found


def run_case(case: Case, corpus: Path, seed: int) -> None:
    """Damage and read; raises whatever the reader raises, but for :class:`ZipLMError` only failures."""
    reader = next(reader for reader in READERS if reader.__name__ == case.reader)
    with damaged_copy(corpus, corpus.parent / f"case-{case.reader}-{case.index}-{os.getpid()}") as folder:
        reader(folder, random.Random(f"{seed} {case}"))


def outcome_of(case: Case, corpus: Path, seed: int) -> Outcome:
    """What became of a case, in this process."""
    from ziplm_deploy.errors import ZipLMError

    what, detail = "taken", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_case(case, corpus, seed)
    except ZipLMError as error:
        what, detail = "refused", str(error)
        if len(detail) > MAX_MESSAGE:
            what = f"a message of {len(detail)} characters"
    except BaseException as error:
        what, detail = type(error).__name__, "".join(traceback.format_exception(error))[-3000:]
    peak_bytes = max(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, WORKERS.peak_bytes)
    if peak_bytes > MAX_MEMORY_BYTES and what in PASSED:
        what = f"{peak_bytes / 2**30:.1f} GiB of memory"
    return Outcome(case, what, detail if what not in PASSED else "", peak_bytes)


def run_cases(wanted: Sequence[Case], corpus: Path, seed: int, lanes: int = LANES) -> list[Outcome]:
    """Outcomes of all cases, each in a forked process."""
    waiting = [list(wanted[at : at + CASES_OF_A_PROCESS]) for at in range(0, len(wanted), CASES_OF_A_PROCESS)]
    running: list[_Process] = []
    outcomes: list[Outcome] = []
    while waiting or running:
        while waiting and len(running) < lanes:
            running.append(_Process(waiting.pop(0), corpus, seed))
        select.select([process.pipe for process in running], [], [], 1.0)
        for process in list(running):
            outcomes += process.read()
            if process.ended:
                running.remove(process)
                if process.waiting:
                    waiting.append(process.waiting)
        if sys.stderr.isatty():
            print(f"\r{len(outcomes)} of {len(wanted)}", end="", file=sys.stderr)
    return outcomes


class _Process:
    """A forked process that runs cases and tells their outcomes, and its parent's view of it."""

    def __init__(self, wanted: list[Case], corpus: Path, seed: int) -> None:
        self.waiting, self.ended = wanted, False
        self._pending, self._began = b"", time.monotonic()
        self.pipe, write = os.pipe()
        os.set_blocking(self.pipe, False)
        self._pid = os.fork()
        if not self._pid:
            os.close(self.pipe)
            _work(wanted, corpus, seed, write)
        os.close(write)

    def read(self) -> list[Outcome]:
        """Outcomes that have arrived; one for a case over which the process died or was killed, too."""
        found: list[Outcome] = []
        end = False
        try:
            while chunk := os.read(self.pipe, 1 << 16):
                self._pending += chunk
            end = True
        except BlockingIOError:
            pass
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            reader, index, *rest = json.loads(line)
            found.append(Outcome(Case(reader, index), *rest))
            self.waiting, self._began = self.waiting[1:], time.monotonic()
        if not end and time.monotonic() - self._began > HANG_SECONDS:
            os.kill(self._pid, signal.SIGKILL)
            found.append(Outcome(self.waiting[0], f"hung for {HANG_SECONDS:.0f} s", "", 0))
            self.waiting, end = self.waiting[1:], True
        if end:
            _, status = os.waitpid(self._pid, 0)
            os.close(self.pipe)
            self.ended = True
            if self.waiting and not found and status:
                found.append(Outcome(self.waiting[0], f"the process died ({status})", "", 0))
                self.waiting = self.waiting[1:]
        return found


def _work(wanted: list[Case], corpus: Path, seed: int, write: int) -> None:
    """Body of a forked process; does not return."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        begins_with = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        limit = begins_with + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in wanted:
            outcome = outcome_of(case, corpus, seed)
            os.write(write, json.dumps([*case, *outcome[1:]]).encode() + b"\n")
            if outcome.peak_bytes > MAX_MEMORY_BYTES:  # the cases after it are for another process
                break
        WORKERS.close()
    finally:
        os._exit(0)


def _repeat(name: str, corpus: Path, seed: int) -> None:
    """Run one case here, with its traceback, and end the program."""
    reader, _, index = name.partition(":")
    run_case(Case(reader, int(index)), corpus, seed)
    raise SystemExit(f"{name}: the file was taken")
