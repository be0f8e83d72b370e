"""GGUF files of a family in llama.cpp, beside the dense model's there and beside the members' own files."""

from __future__ import annotations

from collections.abc import Sequence

from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.reporting.facts import GgufFacts
from ziplm_deploy.reporting.records import FamilyReport, GgufReport
from ziplm_deploy.reporting.table import (
    FIDELITY,
    MISSING,
    call_header,
    call_rows,
    markdown_table,
    percent_text,
    score_text,
    short_ratio,
)


def gguf_reports(record: BenchmarkRecord, files: Sequence[GgufFacts]) -> list[GgufReport]:
    """Files as measured and scored; the first, the dense model's, is what speedups within llama.cpp are over."""
    return [
        GgufReport(
            name=facts.timing.name,
            member=facts.member,
            file=facts.path.name,
            file_type=facts.file_type,
            size_bytes=facts.size_bytes,
            engine_version=facts.timing.engine_version,
            **GgufReport.figures(facts.timing),
            over_dense=record.ratio_between(facts.timing.name, files[0].timing.name) if facts != files[0] else None,
            over_onnx=record.ratio_between(facts.timing.name, facts.served_as),
            accuracy=facts.scores,
            accuracy_intervals=facts.uncertainty.intervals if facts.uncertainty else {},
            of_dense=facts.uncertainty.of_dense if facts.uncertainty else {},
            of_source=facts.uncertainty.of_source if facts.uncertainty else None,
        )
        for facts in files
    ]


def gguf_section(report: FamilyReport) -> list[list[str]]:
    """The part of ``report.md`` on llama.cpp; nothing where no file was measured there."""
    if not report.gguf:
        return []
    first, metric = report.gguf[0], report.metric
    titles = ["file", "MB", "p50 ms", f"over {first.name} [95 %]", "over dense ONNX", "over its own ONNX file"]
    titles += ["perplexity", f"{metric} [95 %]", "of dense ONNX [95 %]", "of its own float32 file [95 %]"]
    compared = {key: title for key, title in FIDELITY.items() if any(key in file.accuracy for file in report.gguf)}
    titles += [f"{title} (ONNX)" for title in compared.values()]
    cells = [[*_row(file, metric), *(score_text(file, key) for key in compared)] for file in report.gguf]
    text = (
        f"`{first.file}` of every member, with {first.file_type} weights, in llama.cpp (xllamacpp "
        f"{first.engine_version}), timed in the same rounds as the files above and scored by llama.cpp on the same "
        f"windows. Speedup within llama.cpp is over {first.name}; `over dense ONNX` is over the dense float32 model on "
        f"{report.baseline_engine}, `over its own ONNX file` over the member's file on {report.engine}. On one call "
        "(median milliseconds, and speedup over the dense ONNX file):"
    )
    files = [report.members[0].served, *report.gguf]
    names = [report.members[0].name, *(file.name for file in report.gguf)]
    calls = markdown_table(call_header(names), call_rows(files))
    return [["## llama.cpp", "", *markdown_table(titles, cells), "", text, "", *calls]]


def _row(file: GgufReport, metric: str) -> list[str]:
    score = file.accuracy.get("inverse_perplexity")
    return [
        file.name,
        f"{file.size_bytes / 1e6:.1f}",
        f"{file.p50_ms:.2f}",
        "1x" if file.over_dense is None else short_ratio(file.over_dense),
        short_ratio(file.ratio),
        short_ratio(file.over_onnx),
        f"{1 / score:.2f}" if score else MISSING,
        score_text(file, metric),
        percent_text(file.of_dense.get(metric)),
        percent_text(file.of_source),
    ]
