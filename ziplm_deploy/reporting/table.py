"""The members of a family as rows of text: the same on the terminal, in ``report.md`` and in the guides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ziplm_deploy.latency.record import FileTiming
from ziplm_deploy.latency.statistics import Ratio
from ziplm_deploy.machine.huge_pages import ASSIGNMENT
from ziplm_deploy.recipe import Variant
from ziplm_deploy.recovery.record import TrainingRecord
from ziplm_deploy.reporting.records import BaselineReport, FamilyReport, FileReport, GgufReport, MemberReport, Timed
from ziplm_deploy.tasks.resampling import Comparison

Cell = Callable[[FileReport | BaselineReport], str]
FIDELITY = {
    "mean_cosine": "cosine to dense",
    "neighbour_overlap": "10-NN overlap",
    "score_correlation": "score correlation to dense",
    "next_token_agreement": "next token as dense",
    "divergence": "KL to dense, nats a token",
}
MISSING = "–"


def baseline_of(report: FamilyReport) -> str:
    """Engine and version that the dense model of all speedups ran on; empty in files from before it was recorded."""
    return f"{report.baseline_engine} {report.baseline_engine_version}".strip()


def page_lines(report: FamilyReport) -> list[str]:
    """What huge pages are worth, where the environment asks for them: the dense model with plain ones beside it."""
    plain = report.plain_pages
    if plain is None:
        return []
    held = report.members[0].served.huge_page_bytes
    return [
        f"huge pages held {megabytes(held)} of the dense model's process in {plain.engine}; without them "
        f"({megabytes(plain.huge_page_bytes)}) it takes {plain.p50_ms:.2f} ms, {plain_ratio(plain)} of its speed; "
        f"serve with {ASSIGNMENT}"
    ]


def plain_ratio(plain: Timed) -> str:
    """Speed of the dense model with plain pages over that with huge ones."""
    return ratio_text(plain.measured_speedup, plain.measured_low, plain.measured_high)


def megabytes(size: int | None) -> str:
    """A size in words; None is unknown."""
    return "unknown MB" if size is None else f"{size / 2**20:.0f} MB"


def file_kind(member: MemberReport) -> str:
    """What a member's files are: ``ONNX`` or ``GGUF``."""
    return "GGUF" if member.served.variant is Variant.GGUF else "ONNX"


def has_other_baseline(report: FamilyReport) -> bool:
    """Whether speedups are over the dense model on another engine than the members'."""
    return report.baseline_engine not in ("", report.engine)


def metric_columns(members: Sequence[MemberReport], metric: str) -> dict[str, str]:
    """Score key to column title: the primary metric, then fidelity to the dense model where it was measured."""
    found = {key for member in members for key in member.served.accuracy}
    primary = {metric: metric} if metric in found else {}
    return primary | {key: title for key, title in FIDELITY.items() if key in found}


def header(members: Sequence[MemberReport], metric: str) -> list[str]:
    """Column titles."""
    size = f"{file_kind(members[0])} MB"
    fixed = ["model", "target", "predicted", "measured [95 %]", "parameters", size, "p50 / p99 ms"]
    fixed[4:4] = ["over torch"] if _over_torch(members) else []
    before = ["before training"] if _trained(members) else []
    return [*fixed, *before, *_score_columns(members, metric), "verdict"]


def rows(members: Sequence[MemberReport], metric: str) -> list[list[str]]:
    """One row a member, as long as :func:`header`."""
    scores, trained, torch = _score_columns(members, metric), _trained(members), _over_torch(members)
    return [_row(member, [*scores.values()], metric if trained else None, torch) for member in members]


def _over_torch(members: Sequence[MemberReport]) -> bool:
    """Whether there are speedups over the dense model in torch to show."""
    return any(member.served.over_torch is not None for member in members)


def _score_columns(members: Sequence[MemberReport], metric: str) -> dict[str, Cell]:
    """Titles and cells of a file's scores; beside the primary one its percent of dense, where that was compared."""
    columns: dict[str, Cell] = {}
    for key, title in metric_columns(members, metric).items():
        columns[title] = functools.partial(_score, metric=key)
        if key == metric and any(member.served.of_dense for member in members):
            columns["of dense [95 %]"] = lambda file: percent_text(file.of_dense.get(metric))
    return columns


def _score(file: FileReport | BaselineReport | GgufReport, metric: str) -> str:
    return f"{file.accuracy[metric]:.4f}" if metric in file.accuracy else MISSING


def _trained(members: Sequence[MemberReport]) -> bool:
    """Whether there is a score before training to show."""
    return any(map(_before_training, members))


def _before_training(member: MemberReport) -> dict[str, float]:
    """Scores of the exported file as pruned; none beside those of another file, which they do not compare with."""
    return member.accuracy_before_training if member.served.variant.is_exported else {}


def shows_no_speedup(member: MemberReport) -> bool:
    """Whether the interval of the measured speedup includes 1: then it is not called a speedup."""
    return member.speedup_target is not None and member.served.measured_low <= 1.0 <= member.served.measured_high


def verdict(member: MemberReport) -> str:
    """Verdict in words; says so where the speedup is within noise."""
    parts = [
        member.verdict,
        "not faster beyond noise" if shows_no_speedup(member) else "",
        not_ahead(member.served.beaten_by, member.served.undecided_against),
    ]
    return "; ".join(filter(None, parts))


def not_ahead(beaten_by: Sequence[str], undecided_against: Sequence[str]) -> str:
    """Baselines that beat a file, or of which that is not decided; empty if it is ahead of all."""
    beaten = f"beaten by {', '.join(beaten_by)}" if beaten_by else ""
    undecided = f"undecided against {', '.join(undecided_against)}" if undecided_against else ""
    return "; ".join(filter(None, (beaten, undecided)))


def score_text(file: FileReport | BaselineReport | GgufReport, metric: str) -> str:
    """A score with its interval, where one is known."""
    if metric not in file.accuracy_intervals:
        return _score(file, metric)
    low, high = file.accuracy_intervals[metric]
    return f"{_score(file, metric)} [{low:.4f}, {high:.4f}]"


def percent_text(comparison: Comparison | None) -> str:
    """A score in percent of another, with its interval; a dash where none is defined."""
    if comparison is None or comparison.percent is None:
        return MISSING
    return f"{comparison.percent:.1f} % [{comparison.percent_low:.1f}, {comparison.percent_high:.1f}]"


def adapters_text(record: TrainingRecord) -> str:
    """What was trained in place of the weights."""
    return f"Trained were adapters of rank {record.lora_rank} (LoRA), which were then added to the weights."


def difference_text(comparison: Comparison | None) -> str:
    """A score less another, with its interval."""
    if comparison is None:
        return MISSING
    return f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]"


def _row(
    member: MemberReport,
    scores: list[Cell],
    metric_before: str | None,
    torch: bool,
) -> list[str]:
    before = [] if metric_before is None else [_before_training(member).get(metric_before)]
    dense = member.speedup_target is None
    return [
        member.name,
        MISSING if dense else f"{member.speedup_target:g}x",
        MISSING if member.predicted_speedup is None else f"{member.predicted_speedup:.2f}x",
        "1x" if dense else _measured(member.served),
        *([short_ratio(member.served.over_torch)] if torch else []),
        f"{member.parameters / 1e6:.2f} M",
        f"{member.served.onnx_bytes / 1e6:.1f}",
        f"{member.served.p50_ms:.2f} / {member.served.p99_ms:.2f}",
        *(MISSING if score is None else f"{score:.4f}" for score in before),
        *(score(member.served) for score in scores),
        verdict(member),
    ]


def baseline_rows(members: Sequence[MemberReport], baselines: Sequence[BaselineReport], metric: str) -> list[list[str]]:
    """One row a baseline, under those of the members."""
    scores, trained = _score_columns(members, metric).values(), _trained(members)
    torch = _over_torch(members)
    return [
        [
            baseline.name,
            MISSING,
            MISSING,
            _measured(baseline),
            *([short_ratio(baseline.over_torch)] if torch else []),
            MISSING,
            f"{baseline.size_bytes / 1e6:.1f}",
            f"{baseline.p50_ms:.2f} / {baseline.p99_ms:.2f}",
            *([MISSING] if trained else []),
            *(score(baseline) for score in scores),
            baseline.title,
        ]
        for baseline in baselines
    ]


def short_ratio(ratio: Ratio | None) -> str:
    """A speedup with its interval; a dash where none is known."""
    return MISSING if ratio is None else f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _measured(file: FileReport | BaselineReport) -> str:
    return f"{file.measured_speedup:.2f}x [{file.measured_low:.2f}, {file.measured_high:.2f}]"


FILE_TITLES = ["model", "file", "measured [95 %]", "p50 ms", "MB", "gzip MB"]


def file_header(members: Sequence[MemberReport], metric: str) -> list[str]:
    """Column titles of :func:`file_rows`."""
    engine = ["engine"] if _on_several_engines(members) else []
    return [*FILE_TITLES[:2], *engine, *FILE_TITLES[2:], *_score_columns(members, metric), "how", "verdict"]


def file_rows(members: Sequence[MemberReport], metric: str) -> list[list[str]]:
    """One row a file of every member."""
    scores, engines = [*_score_columns(members, metric).values()], _on_several_engines(members)
    return [_file_row(member, file, scores, engines) for member in members for file in member.files]


def _on_several_engines(members: Sequence[MemberReport]) -> bool:
    """Whether a file's row must say which engine ran it."""
    return len({file.engine for member in members for file in member.files}) > 1


def _file_row(member: MemberReport, file: FileReport, scores: list[Cell], engines: bool) -> list[str]:
    baseline = member.speedup_target is None and file is member.files[0]  # model.onnx may follow on another engine
    return [
        member.name,
        file.file,
        *([file.engine] if engines else []),
        "1x" if baseline else _measured(file),
        f"{file.p50_ms:.2f}",
        f"{file.onnx_bytes / 1e6:.1f}",
        f"{file.gzip_bytes / 1e6:.1f}",
        *(score(file) for score in scores),
        "; ".join(f"{name} {value}" for name, value in file.facts.items()) or "as exported",
        "recommended" if file.recommended else f"not recommended: {file.reason}",
    ]


def call_header(names: Sequence[str]) -> list[str]:
    """Column titles of :func:`call_rows`, for files of these names."""
    return ["requests", "tokens", "share", *names]


def call_rows(files: Sequence[Timed | FileTiming]) -> list[list[str]]:
    """One row a call, with the milliseconds and the speedup of every file on it; the first file is the baseline."""
    rows = []
    for calls in zip(*(file.calls for file in files), strict=True):
        first, *others = calls
        rows.append(
            [
                str(first.batch_size),
                f"{first.seq_len} after {first.cache_length}" if first.cache_length else str(first.seq_len),
                f"{100 * first.weight:.3g} %" if first.cache_length is None else f"{first.weight:g} a request",
                f"{first.p50_ms:.2f} ms",
                *(f"{call.p50_ms:.2f} ms, {short_ratio(call.ratio)}" for call in others),
            ]
        )
    return rows


def baseline_lines(report: FamilyReport) -> list[str]:
    """A line for every member that a baseline beats, or that is not surely ahead of one."""
    known = {baseline.name: baseline for baseline in report.baselines}
    lines = []
    noisy = report.itself.floor > report.tolerance
    for member in report.members:
        file = member.served
        if noisy and file.undecided_against:
            names = ", ".join(file.undecided_against)
            lines.append(f"{member.name}: timings are too noisy to say whether it is ahead of {names}")
            continue
        for name in (*file.beaten_by, *file.undecided_against):
            figures = f"{_with_score(known[name], report.metric)} against {_with_score(file, report.metric)}"
            how = (
                "is faster and scores higher, both beyond the intervals: use it instead"
                if name in file.beaten_by
                else "is not surely slower, nor are its scores surely lower, so pruning is not recommended over it"
            )
            lines.append(f"{member.name}: {name} {how} ({figures})")
    return lines


def _with_score(file: FileReport | BaselineReport, metric: str) -> str:
    return f"{_measured(file)} at {score_text(file, metric)}"


def markdown_table(titles: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [titles, *cells]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + "---|" * len(titles), *lines[1:]]


def ratio_text(ratio: float, low: float, high: float) -> str:
    """A ratio of latencies with its interval."""
    return f"{ratio:.3f}x [{low:.3f}, {high:.3f}]"


def aa_line(itself: Ratio, tolerance: float) -> str:
    """The A/A line and what it means; noise above ``tolerance``, a fraction, leaves verdicts undecided."""
    text = (
        f"noise: the baseline against itself {ratio_text(itself.value, itself.low, itself.high)}, "
        f"up to {itself.floor_text} from 1"
    )
    if itself.floor > tolerance:
        return f"{text}: more than the {100 * tolerance:g} % that verdicts allow, so they are undecided"
    return f"{text}: trust no smaller difference"
