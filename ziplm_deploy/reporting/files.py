"""Every ONNX file of a member beside those that less was done to: is it worth having?"""

from __future__ import annotations

import zlib
from pathlib import Path

from ziplm_deploy.compression.records import facts_of, int8_record, outside_budget
from ziplm_deploy.errors import CorruptArtifactError
from ziplm_deploy.latency.record import BenchmarkRecord, FileTiming
from ziplm_deploy.pruning.parent import DENSE
from ziplm_deploy.recipe import Variant, file_label
from ziplm_deploy.reporting.records import FileReport
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.evaluate import accuracy_in
from ziplm_deploy.stages.timed_files import dense_as_served, refused_files

GZIP_LEVEL = 3  # weights hardly compress; higher levels take long and gain little


def file_reports(state: Run, name: str, record: BenchmarkRecord) -> list[FileReport]:
    """All files of a member that its engine runs, the exported one first, each after those it is made from.

    Raises:
        CorruptArtifactError: a file, its timing, or the record of how it was made is missing.
    """
    reports: list[FileReport] = []
    refused = refused_files(state)
    for variant, timed_as in _timings(state, name):
        if timed_as not in refused:
            reports.append(_file_report(state, name, variant, timing_of(record, timed_as), reports))
    return reports


def _timings(state: Run, name: str) -> list[tuple[Variant, str]]:
    """Files of a member and their names in the benchmark; ``model.onnx`` of dense twice if it ran on two engines."""
    recipe = state.recipe
    files = [(variant, file_label(name, variant)) for variant in Variant if variant in recipe.variants]
    if name == DENSE and recipe.baseline_engine != recipe.environment.engine:
        files.insert(1, (Variant.FP32, dense_as_served(state)))
    return files


def _file_report(state: Run, name: str, variant: Variant, result: FileTiming, before: list[FileReport]) -> FileReport:
    """``before``: the member's files that were looked at already."""
    path = state.folder.member(name) / variant.onnx_file
    if not path.exists():
        raise CorruptArtifactError(f"expected an exported model at {path}, found none; run ziplm-deploy export again")
    only_timed = result.name == dense_as_served(state)  # scores of dense are those of the baseline's engine
    accuracy = {} if only_timed else accuracy_in(state, state.folder.member(name), variant)
    served, max_loss = accuracy.get(state.task.metric_name), state.recipe.compress.int8.max_loss
    beyond = outside_budget(int8_record(state, name, variant), served, max_loss)
    reasons = [beyond, *_slower_than(result, variant, before)]
    reason = next(filter(None, reasons), "")
    return FileReport(
        variant=variant,
        file=path.name,
        engine=result.engine,
        measured_speedup=result.speedup,
        measured_low=result.speedup_low,
        measured_high=result.speedup_high,
        p50_ms=result.p50_ms,
        p99_ms=result.latency.p99_ms,
        throughput_per_second=result.throughput_per_second,
        peak_memory_bytes=result.peak_memory_bytes,
        onnx_bytes=path.stat().st_size,
        gzip_bytes=state.folder.remembered("gzip_bytes", state.file_hash(path), lambda: gzip_bytes(path)),
        accuracy=accuracy,
        facts=facts_of(state, name, variant),
        recommended=not reason,
        reason=reason,
    )


def _slower_than(result: FileTiming, variant: Variant, before: list[FileReport]) -> list[str]:
    """Beside each file that this one is made from, as timed on the same engine: engines are not compared here."""
    return [
        why_not(result, file)
        for parent in variant.made_from
        for file in before
        if file.variant == parent and file.engine == result.engine
    ]


def why_not(result: FileTiming, parent: FileReport) -> str:
    """Why a file is not worth having beside one that is nearer to the dense model; empty if it is faster, surely."""
    if result.speedup_low > parent.measured_high:
        return ""
    how = "slower" if result.speedup < parent.measured_low else "not faster beyond noise"
    return f"{how} than {parent.file} on {result.engine} ({result.speedup:.2f}x against {parent.measured_speedup:.2f}x)"


def gzip_bytes(path: Path) -> int:
    """Size of a file when compressed, without writing it."""
    compressor, size = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(compressor.compress(block))
    return size + len(compressor.flush())


def timing_of(record: BenchmarkRecord, name: str) -> FileTiming:
    """Timing of a file by its name; raises :class:`CorruptArtifactError` if the benchmark has none."""
    known = {variant.name: variant for variant in record.variants}
    if name not in known:
        raise CorruptArtifactError(
            f"expected a timing of {name} in the benchmark, found {', '.join(known)}; run ziplm-deploy benchmark again"
        )
    return known[name]
