"""Sections of ``report.md`` about quality: scores beside the dense model's, retrieval, classes."""

from __future__ import annotations

from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.reporting.retrieval import retrieval_table, retrieval_text
from ziplm_deploy.reporting.table import difference_text, markdown_table, score_text

MAX_LABELS = 20  # rows of the table of classes


def score_sections(report: FamilyReport) -> list[list[str]]:
    """Every section that the data of this run allow."""
    return [*_scores(report), *_retrieval(report), *_by_label(report)]


def _scores(report: FamilyReport) -> list[list[str]]:
    keys = list(dict.fromkeys(key for member in report.members for key in member.served.accuracy))
    if not keys:
        return []
    cells = [
        [
            member.name,
            *(score_text(member.served, key) for key in keys),
        ]
        for member in report.members
    ]
    return [["## Scores", "", *markdown_table(["model", *keys], cells), *_differences(report, keys)]]


def _differences(report: FamilyReport, keys: list[str]) -> list[str]:
    """Every score less that of dense; nothing in files from before intervals were computed."""
    compared = [member for member in report.members if member.served.of_dense]
    if not compared:
        return []
    known = [key for key in keys if any(key in member.served.of_dense for member in compared)]
    cells = [[m.name, *(difference_text(m.served.of_dense.get(key)) for key in known)] for m in compared]
    n_examples = next(iter(compared[0].served.of_dense.values())).n_examples
    counted = "queries" if report.task == "reranking" else "examples"  # each with all its passages
    text = (
        f"Scores are on {n_examples} {counted}, with the interval of 95 % that other {counted} would have left them in "
        f"(bootstrap). Both models answer the same {counted}, so that the difference to dense is surer than either "
        "score; one whose interval includes 0 is within noise:"
    )
    return ["", text, "", *markdown_table(["model", *known], cells)]


def _retrieval(report: FamilyReport) -> list[list[str]]:
    """What the files find; nothing where there was no data to search."""
    found = report.retrieval
    if found is None:
        return []
    return [["## Retrieval", "", retrieval_text(found), "", *retrieval_table(found, [*found.files])]]


def _by_label(report: FamilyReport) -> list[list[str]]:
    """F1 of every class beside the dense model's; of many classes those that lose most."""
    scored = [member for member in report.members if member.served.by_label]
    if len(scored) < 2:
        return []
    dense, *others = (member.served.by_label for member in scored)
    losses = {label: max(score - other.get(label, 0.0) for other in others) for label, score in dense.items()}
    shown = sorted(losses, key=lambda label: -losses[label])[:MAX_LABELS]
    cells = [[label, *(f"{member.served.by_label.get(label, 0.0):.4f}" for member in scored)] for label in shown]
    rest = f" The {len(shown)} of {len(losses)} classes that lose most." if len(shown) < len(losses) else ""
    text = (
        "F1 of every class without intervals, those first that lose most: no difference here is shown to be more than "
        f"chance, least of all in classes with few examples.{rest}"
    )
    return [["## Scores by class", "", text, "", *markdown_table(["class", *(m.name for m in scored)], cells)]]
