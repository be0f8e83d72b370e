"""All files of all members as they will serve against the dense model, in one run."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ziplm_deploy.artifacts import content_key, parts_of, source_hash
from ziplm_deploy.engines import get_engine
from ziplm_deploy.latency.benchmark import Decided, TimedFile, compare
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.machine.info import machine_info, usable_cores
from ziplm_deploy.recipe import Environment, file_label
from ziplm_deploy.run.member import DENSE
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.baselines import made_baselines
from ziplm_deploy.stages.formats import measured_gguf_files
from ziplm_deploy.stages.stage import Stage
from ziplm_deploy.stages.timed_files import PLAIN_PAGES, files_of_family, runnable_files

FINAL_SEED = 10_000  # order of turns: not that of the closed loop
_SHORT = "benchmark short requests"
SHORTEST = 4  # tokens that a workload may have
READ_FIELDS = {"rounds", "processes", "max_processes", "runs_per_round", "max_seconds", "tolerance"}
GZIP_LEVEL = 3  # weights hardly compress; higher levels take long and gain little


def benchmark(run: Run) -> BenchmarkRecord:
    """Timings and sizes of all files, independent of those that the closed loop ended with.

    A loop ends with the draw of noise that satisfied it: that one is not reported. This one ends when intervals are
    narrow, whatever they say: what ends as soon as a verdict is clear errs more often than its intervals admit.
    Neither baselines nor files on further engines, nor dense with plain pages, prolong it.
    """
    aside = {made.name for made in made_baselines(run)} | {file.label for file in measured_gguf_files(run)}
    aside |= {PLAIN_PAGES}
    files = files_of_family(run)
    key, seed = final_key(run), FINAL_SEED + is_measured_again(run)
    record = measure(run, "benchmark", run.folder.benchmark, files, aside=aside, seed=seed, key=key)
    measure_short_requests(run)
    _weigh_files(run)
    return record


def measure_again(run: Run) -> BenchmarkRecord:
    """Another benchmark of the same files, reported in place of the one that ended a loop around it."""
    run.folder.set_ended_loop(benchmark_key(run, files_of_family(run)))
    return benchmark(run)


def is_measured_again(run: Run) -> bool:
    """Whether the benchmark of the files as they are now is not the one that ended a loop around it."""
    return run.folder.ended_loop == benchmark_key(run, files_of_family(run))


def final_key(run: Run) -> str:
    """Everything that the benchmark of all files depends on."""
    key = benchmark_key(run, files_of_family(run))
    return content_key(after=key) if is_measured_again(run) else key


def _weigh_files(run: Run) -> None:
    """Keep how large files are when compressed; as many at a time as cores are granted, for zlib takes but one."""
    paths = {run.file_hash(file.path): file.path for file in runnable_files(run)}
    unknown = {content: path for content, path in paths.items() if not run.folder.gzip_bytes(content)}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for content, size in zip(unknown, pool.map(gzip_bytes, unknown.values()), strict=True):
            run.folder.set_gzip_bytes(content, size)


def short_requests(run: Run) -> Environment | None:
    """The environment with requests of the evaluation texts' median length; None if they are not much shorter.

    Static shapes fill every request up, so that short ones gain nothing; a workload of several lengths has its own.
    """
    recipe, lengths = run.recipe, run.folder.lengths.get("evaluation")
    workload = recipe.environment.workload
    if not recipe.benchmark.median_length or lengths is None or recipe.export.shapes == "static":
        return None
    if not lengths.are_short or workload.has_several:
        return None
    shorter = workload.model_copy(update={"seq_len": max(SHORTEST, lengths.median), "lengths": None})
    return recipe.environment.model_copy(update={"workload": shorter})


def measure_short_requests(run: Run) -> None:
    """Time the files that targets are about, on requests as short as most of the evaluation texts."""
    environment = short_requests(run)
    if environment is None:
        run.folder.short_benchmark.unlink(missing_ok=True)
        return
    files = _files_of_targets(run)

    def work() -> None:
        progress, config = run.progress, run.recipe.benchmark
        record = compare(
            files, environment, config, DENSE, progress.step, decided=lambda ratios: True, note=progress.note
        )
        record.save(run.folder.short_benchmark)

    run.folder.make(_SHORT, benchmark_key(run, files, environment), [run.folder.short_benchmark], work)


def short_benchmark_of(run: Run) -> BenchmarkRecord | None:
    """What :func:`measure_short_requests` measured of these files, on requests as short as the texts are now."""
    environment = short_requests(run)
    if environment is None or not run.folder.is_made(_SHORT, benchmark_key(run, _files_of_targets(run), environment)):
        return None
    return BenchmarkRecord.load(run.folder.short_benchmark)


def _files_of_targets(run: Run) -> dict[str, TimedFile]:
    names = {DENSE, *(file_label(member.name, run.recipe.target) for member in run.pruned_members)}
    return {name: file for name, file in files_of_family(run).items() if name in names}


def measure(
    run: Run,
    stage: str,
    path: Path,
    files: Mapping[str, TimedFile],
    decided: Decided | None = None,
    *,
    earliest: int | None = None,
    aside: Collection[str] = (),
    seed: int = 0,
    key: str | None = None,
) -> BenchmarkRecord:
    """Time files against the dense model until ``decided``; a stage, which writes ``path``; see :func:`compare`."""
    recipe = run.recipe

    def work() -> None:
        progress = run.progress
        record = compare(
            files,
            recipe.environment,
            recipe.benchmark,
            DENSE,
            progress.step,
            seed=seed,
            decided=decided,
            earliest=earliest,
            aside=aside,
            note=progress.note,
        )
        record.save(path)

    run.folder.make(stage, key or benchmark_key(run, files), [path], work)
    return BenchmarkRecord.load(path)


def benchmark_key(run: Run, files: Mapping[str, TimedFile], environment: Environment | None = None) -> str:
    """Everything that a benchmark depends on: the files themselves, where they run and how they are timed."""
    recipe = run.recipe
    environment = environment or recipe.environment
    own = {None, recipe.environment.engine, recipe.baseline_engine}
    others = sorted({file.engine for file in files.values() if file.engine and file.engine not in own})
    return content_key(
        # Plain pages are those of the dense model, which is among the files: records from before they were timed stay.
        files={name: _content(run, file.path) for name, file in files.items() if name != PLAIN_PAGES},
        baseline_engine=[recipe.baseline_engine, get_engine(recipe.baseline_engine).version()],
        environment=environment.fingerprint,
        benchmark=recipe.benchmark.model_dump(include=READ_FIELDS),
        machine=machine_info().fingerprint,
        engine=get_engine(recipe.environment.engine).version(),
        **({"baseline_engines": {name: get_engine(name).version() for name in others}} if others else {}),
    )


def _content(run: Run, path: Path) -> str:
    """Hash of a model; one that is neither ONNX nor GGUF lies in several files, alone in their folder."""
    return run.file_hash(path) if path.suffix in (".onnx", ".gguf") else source_hash(str(path.parent))


def is_benchmarked(run: Run) -> bool:
    """Whether ``benchmark.json`` is of the files that the run has now, under the recipe's settings."""
    return run.folder.is_made("benchmark", final_key(run))


def gzip_bytes(path: Path) -> int:
    """Size of a file when compressed, without writing it: what a download weighs."""
    compressor, size = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16), 0
    for part in parts_of(path):
        with part.open("rb") as stream:
            while block := stream.read(1 << 20):
                size += len(compressor.compress(block))
    return size + len(compressor.flush())


STAGE = Stage(
    "benchmark",
    lambda run: "all members and the dense model, interleaved",
    benchmark,
)
