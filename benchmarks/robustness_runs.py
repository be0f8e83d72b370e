"""Runs of ``ziplm-deploy`` forked from a process that has imported everything, and told to say where they are."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "ZIPLM_ROBUSTNESS_RUN"  # environment variable that all processes of a run carry
PATIENCE_S = 600.0
START = "(start)"  # before the first stage


def warm_up() -> None:
    """Import what a run does; nothing is computed, since threads do not survive a fork."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import onnxruntime  # noqa: F401
    import torch.onnx  # noqa: F401
    import transformers

    transformers.Trainer  # noqa: B018  # imported when it is first asked for
    transformers.BertForSequenceClassification  # noqa: B018
    import tests.helpers.models
    import tests.helpers.pipeline  # noqa: F401
    import ziplm_deploy.api
    import ziplm_deploy.cli.commands
    import ziplm_deploy.cli.console  # noqa: F401


@dataclass
class Running:
    """A forked run; ``stages`` gives their names as they begin."""

    pid: int
    stages: Any
    log: Path

    def wait_for(self, stage: str) -> None:
        """Return when a stage begins, or the run has ended without it."""
        next((line for line in self.stages if line.strip() == stage), None)

    def wait(self) -> int:
        """Exit code, negative for a signal; a run that hangs is killed."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.stages.close()
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"a run of more than {PATIENCE_S:.0f} s: {self.log}")

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def command_in(folder: Path, name: str, arguments: list[str], replay: Path | None = None) -> Running:
    """Fork a process that runs ``ziplm-deploy`` with these arguments, in an environment of its own in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"

    def work() -> None:
        from ziplm_deploy.cli.commands import main

        if replay is not None:
            _replay(replay)
        sys.argv = ["ziplm-deploy", *arguments]
        main()

    return fork(folder, log, work)


def fork(folder: Path, log: Path, work: Callable[[], None]) -> Running:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Running(pid, os.fdopen(reading), log)
    code = 1
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ[MARK] = str(folder)
        place = folder / "tmpdir"
        place.mkdir(exist_ok=True)
        os.environ["TMPDIR"], os.environ["ZIPLM_TIMING_LOCK"] = str(place), str(place / "timing.lock")
        tempfile.tempdir = None
        _tell_stages(writing)
        os.write(writing, f"{START}\n".encode())
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_stages(pipe: int) -> None:
    """Write the name of every stage into the pipe when its work begins."""
    from ziplm_deploy.run.folder import RunFolder

    make = RunFolder._make

    def observed(self: RunFolder, stage: str, key: str, outputs: list[Path], work: Callable[[], None]) -> bool:
        def told() -> None:
            os.write(pipe, f"{stage}\n".encode())
            work()

        return make(self, stage, key, outputs, told)

    RunFolder._make = observed  # type: ignore[method-assign]


def _replay(undisturbed: Path) -> None:
    """Time files as always, but return what was measured of files of the same names in the undisturbed run."""
    from ziplm_deploy.latency.record import BenchmarkRecord
    from ziplm_deploy.run.manifest import Settling
    from ziplm_deploy.stages import benchmark, settle

    records = [BenchmarkRecord.load(path) for path in undisturbed.rglob("benchmark*.json")]
    known = {_timed(record.environment, [timing.name for timing in record.variants]): record for record in records}
    compare = benchmark.compare

    def replayed(files: Mapping[str, Any], environment: Any, *arguments: Any, **options: Any) -> BenchmarkRecord:
        compare(files, environment, *arguments, **options)
        return known[_timed(environment, files)]

    benchmark.compare = replayed
    drafts = {
        name: draft for path in undisturbed.rglob("settling.json") for name, draft in Settling.load(path).drafts.items()
    }
    time_drafts = settle._time_drafts

    def settled(run: Any, members: Any) -> dict[str, dict[str, float]]:
        time_drafts(run, members)
        known_drafts = {member.name: drafts[member.name].model_dump(exclude={"key"}) for member in members}
        return {name: draft for name, draft in known_drafts.items() if draft["measured"] is not None}

    settle._time_drafts = settled


def _timed(environment: Any, names: Iterable[str]) -> tuple[int, frozenset[str]]:
    """What tells the measurements of one run apart: length of requests, and names of files."""
    return environment.workload.seq_len, frozenset(names)


def orphans(folder: Path) -> int:
    """Processes of a killed run that live on after five seconds."""
    deadline = time.monotonic() + 5.0
    while (found := sum(1 for _ in _processes(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _processes(folder: Path) -> Iterator[int]:
    mark = f"{MARK}={folder}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                yield int(path.parent.name)
        except OSError:
            continue


def in_parallel(cpus: list[int], works: list[Callable[[], Any]]) -> list[Any]:
    """What the works return, which must be JSON; processes share them, one for each of ``cpus``."""
    folder = Path(tempfile.mkdtemp(prefix="ziplm-jobs-"))
    pids = []
    for job, cpu in enumerate(cpus):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            os.sched_setaffinity(0, [cpu])
            for index in range(job, len(works), len(cpus)):
                (folder / f"{index}").write_text(json.dumps(works[index]()), encoding="utf-8")
            code = 0
        except SystemExit as error:
            print(error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    failed = [os.waitpid(pid, 0)[1] for pid in pids]
    found = [folder / f"{index}" for index in range(len(works))]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    shutil.rmtree(folder)
    if any(failed):
        raise SystemExit("expected every run to come to its end, found one that failed")
    return results
