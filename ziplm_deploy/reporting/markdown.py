"""``report.md``: a family of models for people to read."""

from __future__ import annotations

import html

from ziplm_deploy.models.shape import MODULE_KINDS, ModuleId
from ziplm_deploy.reporting.gguf import gguf_section
from ziplm_deploy.reporting.records import FamilyReport, MemberReport
from ziplm_deploy.reporting.sampled import sampled_sentence
from ziplm_deploy.reporting.scores import score_sections
from ziplm_deploy.reporting.table import (
    MISSING,
    aa_line,
    adapters_text,
    baseline_lines,
    baseline_of,
    baseline_rows,
    call_header,
    call_rows,
    difference_text,
    file_header,
    file_kind,
    file_rows,
    has_other_baseline,
    header,
    markdown_table,
    page_lines,
    ratio_text,
    rows,
    shows_no_speedup,
)


def family_markdown(report: FamilyReport) -> str:
    """The whole document."""
    sections = [
        [f"# {report.name}", "", f"{report.model}, {report.task}, method {report.method}, {report.date}"],
        [
            "## Members",
            "",
            *markdown_table(header(report.members, report.metric), _all_rows(report)),
            "",
            *_explanations(report),
        ],
        *_baselines(report),
        *_calls(report),
        ["## Predicted and measured", "", *_deviations(report)],
        *_files(report),
        ["## Sizes", "", *_sizes(report)],
        *_search(report),
        *_in_order(report),
        *score_sections(report),
        *gguf_section(report),
        *_continuations(report),
        *_sampled_text(report),
        *_training(report),
        *_lengths(report),
        ["## Measured on", "", *_environment(report)],
        *([["## Notes", "", *(f"- {note}" for note in report.notes)]] if report.notes else []),
        [
            "## Time",
            "",
            *markdown_table(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in report.stage_seconds.items()]),
        ],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _all_rows(report: FamilyReport) -> list[list[str]]:
    return [*rows(report.members, report.metric), *baseline_rows(report.members, report.baselines, report.metric)]


def _baselines(report: FamilyReport) -> list[list[str]]:
    """How what users get without pruning was made."""
    if not report.baselines:
        return []
    cells = [
        [each.name, each.title, each.tool, each.settings, f"{each.engine} {each.engine_version}"]
        for each in report.baselines
    ]
    text = (
        "What the dense model gives without pruning, by the usual tools; timed in the same run, and scored on the same "
        "rows. The dense model in torch answers as its ONNX file, which was checked against it."
    )
    titles = ["baseline", "what it is", "made by", "settings", "engine"]
    return [["## Baselines", "", text, "", *markdown_table(titles, cells)]]


def _explanations(report: FamilyReport) -> list[str]:
    lines = [
        "Speedup is dense latency / member latency, mean over processes of medians within interleaved rounds, with its "
        "95 % interval: Student's t over processes.",
        *_baseline(report),
        f"Scores are those of the {file_kind(report.members[0])} files themselves.",
        "",
        f"- {aa_line(report.itself, report.tolerance)}",
        *(f"- {line}" for line in page_lines(report)),
    ]
    for member in report.members:
        if member.reason:
            lines.append(f"- {member.name} ({member.verdict}): {member.reason}")
        if shows_no_speedup(member):
            lines.append(f"- {member.name}: the interval includes 1, so no speedup is shown")
    return lines + [f"- {line}" for line in baseline_lines(report)]


def _baseline(report: FamilyReport) -> list[str]:
    """Which engine ran the dense model that speedups are over; nothing in files from before it was recorded."""
    if not report.baseline_engine:
        return []
    members = f"; members run on {report.engine} {report.engine_version}" if has_other_baseline(report) else ""
    weights = report.members[0].served.facts.get("weights")
    dense = f"model with {weights} weights, as the members have them," if weights else "float32 model"
    return [f"Dense is the {dense} on {baseline_of(report)}{members}."]


def _calls(report: FamilyReport) -> list[list[str]]:
    """Every call of the workload, where there are several."""
    if not report.environment.workload.has_several:
        return []
    whole = (
        "of a whole request: the sum of these calls, decode calls between the timed lengths of the cache included"
        if report.environment.workload.generates
        else "of the expected latency: the sum of these calls, weighted by their shares"
    )
    text = (
        f"Milliseconds and speedups above are {whole}. On a call alone (median milliseconds, and speedup over the "
        "dense model with its 95 % interval):"
    )
    names = [member.name for member in report.members]
    files = [member.served for member in report.members]
    return [["## Calls", "", text, "", *markdown_table(call_header(names), call_rows(files))]]


def _deviations(report: FamilyReport) -> list[str]:
    titles = ["model", "predicted", "measured", "deviation", "corrections", "requests/s", "peak MiB"]
    return markdown_table(titles, [_deviation(member) for member in report.members])


def _deviation(member: MemberReport) -> list[str]:
    predicted = member.predicted_speedup
    return [
        member.name,
        MISSING if predicted is None else f"{predicted:.3f}x",
        f"{member.served.measured_speedup:.3f}x",
        MISSING if predicted is None else f"{100 * (member.served.measured_speedup / predicted - 1):+.1f} %",
        MISSING if predicted is None else str(member.corrections),
        f"{member.served.throughput_per_second:.1f}",
        f"{member.served.peak_memory_bytes / 2**20:.0f}",
    ]


def _files(report: FamilyReport) -> list[list[str]]:
    """Every ONNX file; members with one file each need no table of them."""
    if all(len(member.files) < 2 for member in report.members):
        return []
    text = (
        "Speedups are over the dense float32 model of the same run; scores are those of each file on the engine that "
        "runs it. A file that is not faster, beyond noise, than the one it was made from, on the same engine, is not "
        "recommended; nor is one outside the accuracy budget, or one that was changed and not scored."
    )
    rows = file_rows(report.members, report.metric)
    return [["## Files", "", text, "", *markdown_table(file_header(report.members, report.metric), rows)]]


def _sizes(report: FamilyReport) -> list[str]:
    """Heads / FFN columns of every layer, one column a member."""
    layers = sorted({ModuleId.parse(name).layer for member in report.members for name in member.sizes})
    cells = [
        [
            str(layer),
            *(
                " / ".join(str(member.sizes.get(str(ModuleId(layer, kind)), MISSING)) for kind in MODULE_KINDS)
                for member in report.members
            ),
        ]
        for layer in layers
    ]
    return [
        "Attention heads / FFN columns of each layer; 0 is a dropped module.",
        "",
        *markdown_table(["layer", *(member.name for member in report.members)], cells),
    ]


def _search(report: FamilyReport) -> list[list[str]]:
    """Distance of the chosen plans, and of those the search started from, to the model that they prune."""
    searched = [member for member in report.members if member.search_loss is not None]
    if not searched:
        return []
    seeds = list(dict.fromkeys(name for member in searched for name in member.seed_losses))
    cells = [
        [
            member.name,
            f"{member.search_loss:.4g}",
            *(f"{member.seed_losses[name]:.4g}" if name in member.seed_losses else MISSING for name in seeds),
        ]
        for member in searched
    ]
    origin = "the dense model"
    if report.recovery == "gradual":
        origin = "the model that is pruned (dense for the first member, the trained one before it for the others)"
    text = (
        f"Distance to {origin} on calibration examples, smaller is better: the chosen plan beside the "
        "plans that the search started from, all within the same latency budget. `uniform` prunes every layer alike; "
        "`relative error` is the plan without search."
    )
    return [["## Search", "", text, "", *markdown_table(["model", "chosen", *seeds], cells)]]


def _in_order(report: FamilyReport) -> list[list[str]]:
    """How many structures the order of pruning has exchanged."""
    decided = [member for member in report.members if member.exchanged_fraction is not None]
    if not decided:
        return []
    text = (
        "Structures and weights were decided layer by layer, on what the pruned layers before give. So many of the "
        "structures kept in modules that lost some are others than the inputs of the whole model would have kept:"
    )
    cells = [[member.name, f"{member.exchanged_fraction:.1%}"] for member in decided]
    return [["## Pruned in order", "", text, "", *markdown_table(["model", "exchanged"], cells)]]


def _continuations(report: FamilyReport) -> list[list[str]]:
    """Perplexity, for those who know models by it, and what each model writes."""
    written = [member for member in report.members if member.continued]
    if not written:
        return []
    perplexities = [
        f"{member.name} {1 / member.served.accuracy['inverse_perplexity']:.2f}"
        for member in written
        if member.served.accuracy.get("inverse_perplexity")
    ]
    windows = report.windows
    of = f" of windows of {windows.context} tokens, {windows.stride} apart" if windows else ""
    lines = [f"Perplexity{of}: {', '.join(perplexities)}. The likeliest tokens after beginnings of evaluation texts:"]
    for prompt in written[0].continued:
        cells = [[member.name, _one_line(member.continued.get(prompt, ""))] for member in written]
        lines += ["", f"> {_one_line(prompt)}", "", *markdown_table(["model", "goes on"], cells)]
    return [["## Continuations", "", *lines]]


def _one_line(text: str) -> str:
    """Text of a model as a cell of a table: no line breaks, nothing that Markdown or HTML would read."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`")


def _sampled_text(report: FamilyReport) -> list[list[str]]:
    return [] if report.sampled_text is None else [["## Sampled text", "", sampled_sentence(report.sampled_text)]]


def _training(report: FamilyReport) -> list[list[str]]:
    """What recovery took, and how far its loss fell."""
    trained = [(member, member.training) for member in report.members if member.training is not None]
    if not trained:
        return []
    cells = [
        [
            member.name,
            str(record.steps),
            str(record.examples_per_step),
            f"{record.seconds:.0f}",
            f"{record.samples_per_second:.0f}",
            record.device,
            f"{record.losses[0][1]:.4g} to {record.losses[-1][1]:.4g}" if record.losses else MISSING,
            _change(member, report.metric),
        ]
        for member, record in trained
    ]
    text = {
        "one-shot": "Each member was pruned from the dense model, then trained.",
        "gradual": "Each member was pruned from the trained one before it, then trained.",
    }[report.recovery]
    text = " ".join([text, *dict.fromkeys(adapters_text(record) for _, record in trained if record.lora_rank)])
    titles = ["model", "steps", "examples a step", "seconds", "examples/s", "device", "loss"]
    titles += [f"{report.metric} of {'model.gguf' if file_kind(report.members[0]) == 'GGUF' else 'model.onnx'}"]
    return [["## Training", "", text, "", *markdown_table(titles, cells)]]


def _change(member: MemberReport, metric: str) -> str:
    """What training did to the score of one file, whichever file the target is about."""
    before, after = (scores.get(metric) for scores in (member.accuracy_before_training, member.exported_accuracy))
    if before is None or after is None:
        return MISSING
    effect = "" if member.training_effect is None else f" ({difference_text(member.training_effect)})"
    return f"{before:.4f} to {after:.4f}{effect}"


def _lengths(report: FamilyReport) -> list[list[str]]:
    """How long the texts of the data sets are; nothing for images."""
    if not report.lengths:
        return []
    titles = ["data", "examples", "median tokens", "90 % have up to", "longest", "limit", "cut"]
    cells = [
        [
            name,
            f"{found.examples:,}",
            *map(str, (found.median, found.p90, found.longest, found.limit)),
            f"{found.cut:,}",
        ]
        for name, found in report.lengths.items()
    ]
    return [["## Lengths of the texts", "", *markdown_table(titles, cells), *_short_requests(report)]]


def _short_requests(report: FamilyReport) -> list[str]:
    """Speedups on requests as short as half of the texts are, beside those of the workload."""
    if report.short_tokens is None:
        return []
    titles = ["model", f"speedup at {report.environment.workload.seq_len} tokens", f"at {report.short_tokens}"]
    cells = [
        [
            member.name,
            ratio_text(member.served.measured_speedup, member.served.measured_low, member.served.measured_high),
            ratio_text(short.value, short.low, short.high),
        ]
        for member in report.members
        if (short := member.short_speedup) is not None
    ]
    text = f"Half of the texts have at most {report.short_tokens} tokens. Requests as short as that gain this much:"
    noise = ["", f"At that length, {aa_line(itself, report.tolerance)}."] if (itself := report.short_itself) else []
    return ["", text, "", *markdown_table(titles, cells), *noise]


def _environment(report: FamilyReport) -> list[str]:
    machine, environment = report.machine, report.environment
    baseline = f", baseline on {baseline_of(report)}" if report.baseline_engine else ""
    return [
        f"- {environment.describe()} ({environment.workload.scenario}), {report.engine} {report.engine_version}"
        f"{baseline}",
        f"- {machine.cpu_model}; {' '.join(machine.isa_flags)}",
        f"- {machine.usable_cores} of {machine.logical_cores} cores granted, "
        f"{machine.memory_bytes / 2**30:.1f} GiB, {machine.operating_system}",
        "- " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        *_other_versions(report),
    ]


def _other_versions(report: FamilyReport) -> list[str]:
    """Stages whose results are older, or newer, than the packages that the latencies were measured with."""
    stages: dict[str, list[str]] = {}
    for stage, packages in report.other_versions.items():
        for name, version in packages.items():
            stages.setdefault(f"{name} {version}", []).append(stage)
    return [f"- made with {package}: {', '.join(names)}" for package, names in stages.items()]
