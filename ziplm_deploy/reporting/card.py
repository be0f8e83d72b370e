"""``README.md`` in a member's folder: the model card."""

from __future__ import annotations

import yaml

from ziplm_deploy.engines import get_engine
from ziplm_deploy.machine.huge_pages import ASSIGNMENT
from ziplm_deploy.models.location import is_hub_id, public_name
from ziplm_deploy.models.shape import ModuleId
from ziplm_deploy.recipe import Variant, file_label
from ziplm_deploy.reporting.records import FamilyReport, MemberReport
from ziplm_deploy.reporting.retrieval import card_text, retrieval_table
from ziplm_deploy.reporting.sampled import sampled_sentence
from ziplm_deploy.reporting.table import (
    aa_line,
    adapters_text,
    baseline_of,
    call_header,
    call_rows,
    difference_text,
    file_header,
    file_kind,
    file_rows,
    markdown_table,
    not_ahead,
    percent_text,
    plain_ratio,
    score_text,
    shows_no_speedup,
)


def model_card(
    report: FamilyReport, member: MemberReport, ort_class: str | None, dimensions: tuple[int, ...] = ()
) -> str:
    """Card of one member: what was measured, where, and how to load it.

    Args:
        dimensions: sizes that embeddings of the original may be cut to, as its files say.
    """
    dense = report.members[0]
    title = f"{report.name}, {member.name}"
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(report, member, ort_class), sort_keys=False, allow_unicode=True)}---",
        f"# {title}\n\n{_summary(report, member)}",
        "\n".join(
            ["## Measured", "", *_measured(report, member, dense), *_calls(member, dense), "", *_conditions(report)]
        ),
        *(["\n".join(["## Retrieval", "", *_retrieval(report, member)])] if report.retrieval is not None else []),
        *(["\n".join(["## Without pruning", "", *_baselines(report, member)])] if report.baselines else []),
        *(["\n".join(["## Files", "", *_files(report, member)])] if len(member.files) > 1 else []),
        *filter(None, (get_engine(name).notice for name in dict.fromkeys((report.engine, _baseline_engine(report))))),
        _usage_of_gguf(report, member) if file_kind(member) == "GGUF" else _usage(report, member, ort_class),
        *filter(None, [_cuts(dimensions)]),
        "The licence and limits of the original model apply to this one, too; its scores on other data are not known.",
    ]
    return "\n\n".join(sections) + "\n"


# Tasks that a model hub knows by another name.
_PIPELINE_TAGS = {
    "multi-label-classification": "text-classification",
    "text-regression": "text-classification",
    "reranking": "text-ranking",
}

_CLASSES_OF_SENTENCE_TRANSFORMERS = {"sentence-similarity": "SentenceTransformer", "reranking": "CrossEncoder"}


def _front_matter(report: FamilyReport, member: MemberReport, ort_class: str | None) -> dict[str, object]:
    is_gguf = file_kind(member) == "GGUF"
    of_onnx = "onnxruntime" if ort_class is None else "optimum"
    facts: dict[str, object] = {
        "library_name": "llama.cpp" if is_gguf else of_onnx,
        "pipeline_tag": _PIPELINE_TAGS.get(report.task, report.task),
        "tags": ["gguf" if is_gguf else "onnx", "ziplm-deploy", *([] if member.speedup_target is None else ["pruned"])],
    }
    if is_hub_id(report.model):  # the hub takes any other name for somebody's model
        facts["base_model"] = report.model
    return facts


def _summary(report: FamilyReport, member: MemberReport) -> str:
    if member.speedup_target is None:
        return f"{public_name(report.model)}, not pruned: the dense baseline of this family."
    heads = sum(size for name, size in member.sizes.items() if ModuleId.parse(name).kind == "attention")
    columns = sum(size for name, size in member.sizes.items() if ModuleId.parse(name).kind == "ffn")
    text = (
        f"{public_name(report.model)}, pruned by {report.method} for {member.speedup_target:g}x: {heads} attention "
        f"heads and {columns} FFN columns are left, {member.parameters:,} parameters. Verdict: {member.verdict}."
    )
    if member.training is not None:
        record = member.training
        text += (
            f" Trained after pruning ({report.recovery}): {record.steps} steps of {record.examples_per_step} examples."
        )
        if record.lora_rank:
            text += f" {adapters_text(record)}"
    if report.sampled_text is not None:
        text += f" {sampled_sentence(report.sampled_text)}"
    if member.reason:
        text += f" {member.reason[0].upper()}{member.reason[1:]}."
    if shows_no_speedup(member):
        text += " The interval of the measured speedup includes 1: it is not faster beyond noise."
    return text


def _measured(report: FamilyReport, member: MemberReport, dense: MemberReport) -> list[str]:
    def figure(value: float | None, pattern: str) -> str:
        return "–" if value is None else pattern.format(value)

    cells = [
        ["speedup, measured", f"{member.served.measured_speedup:.3f}x", "1x"],
        ["95 % interval", f"{member.served.measured_low:.3f} to {member.served.measured_high:.3f}", "–"],
        ["speedup, predicted", figure(member.predicted_speedup, "{:.3f}x"), "–"],
        ["p50 ms", f"{member.served.p50_ms:.3f}", f"{dense.served.p50_ms:.3f}"],
        ["p99 ms", f"{member.served.p99_ms:.3f}", f"{dense.served.p99_ms:.3f}"],
        [
            "requests per second",
            f"{member.served.throughput_per_second:.1f}",
            f"{dense.served.throughput_per_second:.1f}",
        ],
        ["parameters", f"{member.parameters:,}", f"{dense.parameters:,}"],
        [f"{member.served.variant.file_name} bytes", f"{member.served.onnx_bytes:,}", f"{dense.served.onnx_bytes:,}"],
        *([key, score_text(member.served, key), score_text(dense.served, key)] for key in member.served.accuracy),
        *(
            [f"{key}, of dense", f"{percent_text(found)}; {difference_text(found)}", "–"]
            for key, found in member.served.of_dense.items()
        ),
        *(
            [f"{key}, {_before_training(member)}", f"{value:.4f}", "–"]
            for key, value in member.accuracy_before_training.items()
        ),
    ]
    baseline = f"dense on {baseline_of(report)}, same run" if report.baseline_engine else "dense, same run"
    return markdown_table(["", member.name, baseline], cells)


def _baselines(report: FamilyReport, member: MemberReport) -> list[str]:
    """What the dense model gives by the usual tools, timed and scored with this member."""
    cells = [
        [
            baseline.title,
            f"{baseline.measured_speedup:.3f}x",
            f"{baseline.measured_low:.3f} to {baseline.measured_high:.3f}",
            score_text(baseline, report.metric),
            percent_text(baseline.of_dense.get(report.metric)),
            f"{baseline.tool}: {baseline.settings}",
        ]
        for baseline in report.baselines
    ]
    titles = ["same run", "speedup, measured", "95 % interval", report.metric, "of dense", "made by"]
    verdict = not_ahead(member.served.beaten_by, member.served.undecided_against)
    return [*markdown_table(titles, cells), *(["", f"This model is {verdict}: see report.md."] if verdict else [])]


def _retrieval(report: FamilyReport, member: MemberReport) -> list[str]:
    """What this member's files find, beside the dense model."""
    found = report.retrieval
    assert found is not None
    own = [file_label(member.name, file.variant) for file in member.files]
    labels = [label for label in dict.fromkeys([report.members[0].name, *own]) if label in found.files]
    return [card_text(found), "", *retrieval_table(found, labels)]


def _before_training(member: MemberReport) -> str:
    """What the scores before training are of, where the others are not of the same file."""
    return "before training" if member.served.variant.is_exported else f"{Variant.FP32.file_name} before training"


def _files(report: FamilyReport, member: MemberReport) -> list[str]:
    """Every ONNX file in this folder."""
    return markdown_table(file_header([member], report.metric), file_rows([member], report.metric))


def _calls(member: MemberReport, dense: MemberReport) -> list[str]:
    """Every call of the workload, where there are several."""
    if not member.served.calls:
        return []
    files = list({each.name: each.served for each in (dense, member)}.items())
    rows = call_rows([file for _, file in files])
    text = "These are of the expected latency, the weighted sum of all calls. On each call alone:"
    return ["", text, "", *markdown_table(call_header([name for name, _ in files]), rows)]


def _conditions(report: FamilyReport) -> list[str]:
    machine, environment = report.machine, report.environment
    without = report.plain_pages
    plain = f"; without, dense in {without.engine} has {plain_ratio(without)} of its speed" if without else ""
    pages = f", huge pages ({ASSIGNMENT} in the server's environment{plain})" if environment.huge_pages else ""
    baseline = f"dense baseline on {baseline_of(report)}, " if report.baseline_engine else ""
    return [
        f"CPU {machine.cpu_model} ({' '.join(machine.isa_flags)}), {environment.threads} thread(s){pages}, "
        f"{environment.workload.describe()}, {report.engine} {report.engine_version}, {baseline}{report.date}. "
        "On another CPU, shape or thread count the speedup is another one: measure it there.",
        "",
        f"Of this measurement, {aa_line(report.itself, report.tolerance)}.",
    ]


def _usage(report: FamilyReport, member: MemberReport, ort_class: str | None) -> str:
    exported, file = Variant.FP32.file_name, member.served.variant.file_name
    opens_alone = ort_class is not None or report.task != "text-generation"  # a bare session keeps no cache
    name, origin = ("", "") if file == exported else (f', file_name="{file}"', f": {exported}, not {file}")
    return "\n".join(
        [
            "## Use",
            "",
            *_pages(report),
            *_other_engine(report, member),
            *(_of_runner(member, name) if report.task == "text-generation" else []),
            *(_of_onnx_runtime(member, file, ort_class, name) if opens_alone else []),
            *(_UNPADDED if ort_class is not None and report.task == "text-generation" else []),
            *(_of_sentence_transformers(report, member) if ort_class is not None else []),
            "```python",
            "import ziplm_deploy",
            "",
            f'model = ziplm_deploy.load("{member.folder}")  # torch{origin}',
            "```",
        ]
    )


def _pages(report: FamilyReport) -> list[str]:
    """How a process gets the pages that were measured with, where they were asked for."""
    if not report.environment.huge_pages:
        return []
    return ["The process that serves begins with huge pages, as those that were measured:", "", "```",
            f"{ASSIGNMENT} python serve.py", "```", ""]  # fmt: skip


_UNPADDED = [
    "Prompts of one batch must be of one length there, unless the file was exported with "
    "`export.cache_form: portable`: positions come from lengths, so that padding on the left is read as text.",
    "",
]


def _of_onnx_runtime(member: MemberReport, file: str, ort_class: str | None, name: str) -> list[str]:
    """Lines that open the file, by optimum where that knows the type; ``name``: an argument for another file."""
    if ort_class is None:
        return [
            "```python",
            "import onnxruntime  # optimum, and sentence-transformers by it, do not know this type of model yet",
            "",
            f'session = onnxruntime.InferenceSession("{member.folder}/{file}")',
            "```",
            "",
        ]
    return [
        "```python",
        f"from optimum.onnxruntime import {ort_class}",
        "",
        f'model = {ort_class}.from_pretrained("{member.folder}"{name})  # this folder',
        "```",
        "",
    ]


def _of_runner(member: MemberReport, name: str) -> list[str]:
    """Lines that continue a text; ``name``: an argument for another file."""
    return [
        "```python",
        "import ziplm_deploy  # here with ONNX Runtime and tokenizers alone, without torch",
        "",
        f'model = ziplm_deploy.load_runner("{member.folder}"{name.replace("file_name=", "file=")})',
        'print(model.generate("Once upon a time", max_new_tokens=40))',
        "```",
        "",
    ]


def _of_sentence_transformers(report: FamilyReport, member: MemberReport) -> list[str]:
    """Snippet for the tasks that sentence-transformers has, which takes texts and puts prompts before them."""
    name = _CLASSES_OF_SENTENCE_TRANSFORMERS.get(report.task)
    if name is None:
        return []
    file = member.served.file
    return [
        "```python",
        f"from sentence_transformers import {name}",
        "",
        f'model = {name}("{member.folder}", backend="onnx", model_kwargs={{"file_name": "{file}"}})',
        "```",
        "",
    ]


def _usage_of_gguf(report: FamilyReport, member: MemberReport) -> str:
    """How llama.cpp runs the file, and where the same weights lie before they were rounded."""
    pages = f"{ASSIGNMENT} " if report.environment.huge_pages else ""
    return "\n".join(
        [
            "## Use",
            "",
            "```",
            f'{pages}llama-cli -m {member.folder}/{member.served.file} -p "Once upon a time"',
            "```",
            "",
            "```python",
            "import ziplm_deploy",
            "",
            f'model = ziplm_deploy.load("{member.folder}")  # torch, in float32: before weights became '
            f"{member.served.facts['weights']}",
            "```",
        ]
    )


def _cuts(dimensions: tuple[int, ...]) -> str:
    """What is known about shorter embeddings, in the words that the files of models have for it."""
    if not dimensions:
        return ""
    return (
        f'The original was trained to have its embeddings cut (Matryoshka): `"matryoshka_dims": '
        f"{sorted(dimensions, reverse=True)}`. The first so many numbers are an embedding, to be normalized again. "
        "The scores above are those of whole ones."
    )


def _baseline_engine(report: FamilyReport) -> str:
    return report.baseline_engine or report.engine


def _other_engine(report: FamilyReport, member: MemberReport) -> list[str]:
    """Warning where the figures are not those of the engine that the snippet uses."""
    engine = report.engine if member.speedup_target is not None else _baseline_engine(report)
    if engine == "onnxruntime":
        return []
    return [
        f"The figures above are those of {member.served.variant.file_name} on {engine}. Stock optimum runs it on ONNX "
        "Runtime, where its latency is another one and its scores may differ.",
        "",
    ]
