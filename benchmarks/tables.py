"""Fill the generated parts of the documents from committed results: ``python benchmarks/tables.py``.

``<!-- table:NAME -->`` … ``<!-- end:NAME -->`` in any of :data:`DOCUMENTS`, as often as it is wanted: ``recipe`` comes
from the recipe's own field descriptions, ``guides`` from the guides, all else from ``benchmarks/results``. With
``--check`` nothing is written; exit code 1 says which documents are stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from accuracy import gain_text, percent_of_dense_text, percent_text
from common import PENDING, RESULTS, ROOT, cpu_text, goal_met, interval_text, of_result, place_text
from summary import read_results
from summary import table as figures_table
from tables_compression import (
    compound_table,
    compound_targets_table,
    int8_ranges_table,
    int8_table,
    sparsity_accuracy_table,
    zeros_and_integers,
)
from tables_models import architectures_table, decoder_family_table, decoder_speed_table

from ziplm_deploy.artifacts import write_text
from ziplm_deploy.guides import first_sentence, guide_names
from ziplm_deploy.recipe import recipe_reference
from ziplm_deploy.reporting.records import BaselineReport, MemberReport
from ziplm_deploy.reporting.table import MISSING, baseline_rows, header, markdown_table, rows, verdict

GUIDES = ROOT / "ziplm_deploy" / "guides"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(GUIDES.rglob("*.md")))
MARK = re.compile(r"<!-- table:(\S+) -->")
TITLES = {"stsb": "STS-B"}
FOLDERS = {"extending": "Add a method, an architecture, an engine, a task or a stage of your own."}  # of guides


def _run_table(result: dict[str, Any]) -> str:
    """Members of a committed run, all that is known of them, and where it was measured."""
    members, metric = _quickstart_members(result), result["settings"]["metric"]
    cells = [*rows(members, metric), *baseline_rows(members, _quickstart_baselines(result), metric)]
    return "\n".join([*markdown_table(header(members, metric), cells), "", _quickstart_place(result)])


quickstart_table = of_result("quickstart")(_run_table)
quickstart_decoder_table = of_result("quickstart_decoder")(_run_table)


@of_result("quickstart")
def quickstart_short_table(result: dict[str, Any]) -> str:
    """Members of the committed quickstart run in five columns."""
    metric = result["settings"]["metric"]
    cells = [
        [
            member.name,
            _target_and_measured(member),
            f"{member.served.accuracy[metric]:.4f}",
            f"{member.served.onnx_bytes / 1e6:.1f}",
            verdict(member),
        ]
        for member in _quickstart_members(result)
    ]
    cells += [
        [
            baseline.name,
            interval_text(baseline.measured_speedup, baseline.measured_low, baseline.measured_high),
            f"{baseline.accuracy[metric]:.4f}" if baseline.accuracy else MISSING,
            f"{baseline.size_bytes / 1e6:.1f}",
            baseline.title,
        ]
        for baseline in _quickstart_baselines(result)
    ]
    titles = ["model", "target → measured [95 %]", metric.capitalize(), "ONNX MB", "verdict"]
    return "\n".join([*markdown_table(titles, cells), "", _quickstart_place(result)])


def _target_and_measured(member: MemberReport) -> str:
    if member.speedup_target is None:
        return "1x"
    served = member.served
    measured = interval_text(served.measured_speedup, served.measured_low, served.measured_high)
    return f"{member.speedup_target:g}x → {measured}"


def _quickstart_members(result: dict[str, Any]) -> list[MemberReport]:
    return [MemberReport.model_validate(row) for row in result["rows"]]


def _quickstart_baselines(result: dict[str, Any]) -> list[BaselineReport]:
    return [BaselineReport.model_validate(fields) for fields in result["settings"].get("baselines", [])]


def _quickstart_place(result: dict[str, Any]) -> str:
    machine, (ratio, low, high) = result["machine"], result["settings"]["aa"]
    return (
        f"{result['settings']['environment']}, {machine['cores']} core(s) of {cpu_text(machine)}, onnxruntime "
        f"{result['versions']['onnxruntime']}, {result['date'][:10]}; the dense model against itself in the same run: "
        f"{ratio:.3f} [{low:.3f}, {high:.3f}]. Intervals over {_processes(result['settings'])}. The run took "
        f"{result['figures']['total_seconds']['value'] / 60:.1f} minutes."
    )


@of_result("pareto")
def headline(result: dict[str, Any]) -> str:
    """What the picture says in one sentence, and how it was measured."""
    own = max((row for row in result["rows"] if row["method"] == "ziplm"), key=lambda row: row["measured_speedup"])
    data = TITLES.get(own["task"], own["task"])
    rivals = [row for row in result["rows"] if row["method"] != "ziplm" and row["target"] == own["target"]]
    rival = max(rivals, key=lambda row: row["score"])
    (about,) = result["settings"]["tasks"].values()
    machine, recovery = result["machine"], about["recover"]
    speedup = interval_text(own["measured_speedup"], own["measured_low"], own["measured_high"])
    what = (
        f"**{speedup} as fast, with {percent_of_dense_text(own)} of the dense score** "
        f"({own['metric'].capitalize()} {own['score']:.4f} against {own['dense_score']:.4f} on {data}); the next "
        f"method at that target, `{rival['method']}`, keeps {percent_of_dense_text(rival)}{gain_text(rival)}."
    )
    how = (
        f"Measured by `benchmarks/pareto.py`: all-MiniLM-L6-v2, every method trained alike for {recovery['max_steps']} "
        f"steps without labels, scores of the ONNX files; baseline: the dense float32 model on onnxruntime "
        f"{result['versions']['onnxruntime']} in the same run; batch 1, 128 tokens, 1 thread of {machine['cores']} "
        f"core(s) of {cpu_text(machine)}, {result['date'][:10]}; one seed, intervals over {_processes(about)}."
    )
    return f"{what} {how}"


def _processes(about: dict[str, Any]) -> str:
    """How many processes a file was timed in; results from before that was recorded had one."""
    n = about.get("processes", 1)
    return "one process a model" if n == 1 else f"{n} processes a model"


@of_result("family")
def family_table(result: dict[str, Any]) -> str:
    """Members of the committed families: what training brought back, and what it took."""
    titles = [
        "task",
        "measured [95 %]",
        "metric",
        "dense",
        "before training",
        "trained",
        "of dense",
        "steps",
        "seconds",
    ]
    cells = [
        [
            row["task"],
            interval_text(row["measured_speedup"], row["measured_low"], row["measured_high"]),
            row["metric"],
            f"{row['dense_score']:.4f}",
            f"{row['score_before_training']:.4f}",
            f"{row['score']:.4f}",
            percent_of_dense_text(row),
            str(row["training"]["steps"]),
            f"{row['training']['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    places: dict[str, list[str]] = {}
    for task, about in result["settings"]["tasks"].items():
        origin = result | about
        place = f"{origin['machine']['cores']} core(s) of {cpu_text(origin['machine'])}, {origin['date'][:10]}"
        places.setdefault(place, []).append(task)
    caption = (
        "One gradual run a task, one seed: " + "; ".join(f"{', '.join(t)} on {p}" for p, t in places.items()) + "."
    )
    return "\n".join([*markdown_table(titles, cells), "", caption])


@of_result("ablation")
def ablation_table(result: dict[str, Any]) -> str:
    """What is left of the dense score with each part of recovery changed, target by target."""
    targets = sorted({row["target"] for row in result["rows"]})
    found = {(row["task"], row["variant"], row["target"]): row["percent_of_dense"] for row in result["rows"]}
    cells = [
        [task, variant, *(percent_text(found.get((task, variant, target))) for target in targets)]
        for task, variant in dict.fromkeys(key[:2] for key in found)
    ]
    titles = ["task", "training", *(f"{target:g}x" for target in targets)]
    return "\n".join([*markdown_table(titles, cells), "", place_text(result)])


@of_result("pareto")
def pareto_table(result: dict[str, Any]) -> str:
    """Scores of every method at its measured speedup, after the same training."""
    cells = [
        [
            row["task"],
            row["method"],
            interval_text(row["measured_speedup"], row["measured_low"], row["measured_high"]),
            f"{row['score']:.4f}",
            percent_of_dense_text(row),
        ]
        for row in sorted(result["rows"], key=lambda row: (row["task"], row["target"]))
    ]
    titles = ["task", "method", "measured [95 %]", "score", "of dense"]
    return "\n".join([*markdown_table(titles, cells), "", place_text(result)])


def figures_with_goals() -> str:
    """Every figure of every committed result that has a goal, against it."""
    results = read_results(RESULTS)
    for result in results:
        result["figures"] = {k: v for k, v in result["figures"].items() if goal_met(v["value"], v["goal"]) is not None}
    return figures_table(results) if results else PENDING


def guides_table() -> str:
    """Every guide with its first sentence; those of a folder share a row."""
    alone = [name for name in guide_names() if "/" not in name]
    cells = [[_guide_link(name), first_sentence(name)] for name in alone]
    for folder, about in FOLDERS.items():
        if links := [_guide_link(name) for name in guide_names() if name.startswith(f"{folder}/")]:
            cells.append([", ".join(links), about])
    return "\n".join(markdown_table(["`ziplm-deploy guide NAME`", "what is in it"], cells))


def _guide_link(name: str) -> str:
    return f"[{name}](ziplm_deploy/guides/{name}.md)"


@of_result("install")
def install(result: dict[str, Any]) -> str:
    """What the documented install weighs and takes."""
    figures, settings = result["figures"], result["settings"]
    return (
        f"It weighs {figures['install_gigabytes']['value']:.1f} GB and took "
        f"{figures['install_seconds']['value']:.0f} s on {result['machine']['cores']} cores ({settings['torch']}, "
        f"transformers {settings['transformers']}, {result['date'][:10]})."
    )


def retrieval_table(result: dict[str, Any]) -> str:
    """What members find, both ways, and what was searched."""
    cells = []
    for row in result["rows"]:
        dense = row["target"] is None
        speedup = interval_text(row["measured_speedup"], row["measured_low"], row["measured_high"])
        found = [text for kind in ("symmetric", "asymmetric") for text in _found_cells(row[kind], kind, dense)]
        cells.append([row["model"], "1x" if dense else speedup, *found])
    settings = result["settings"]
    titles = ["model", "measured [95 %]", "symmetric", "of dense", "asymmetric", "of dense"]
    text = (
        f"nDCG@10 of {settings['n_queries']:,} questions among {settings['n_passages']:,} paragraphs; "
        f"{settings['environment']}, {place_text(result)}"
    )
    return "\n".join([*markdown_table(titles, cells), "", text])


def _found_cells(found: dict[str, Any], kind: str, dense: bool) -> list[str]:
    if dense and kind == "asymmetric":
        return [MISSING, MISSING]
    score = f"{found['score']:.4f} [{found['score_low']:.4f}, {found['score_high']:.4f}]"
    return [score, MISSING if dense else percent_of_dense_text(found)]


TABLES: dict[str, Callable[[], str]] = {
    "install": install,
    "headline": headline,
    "quickstart-short": quickstart_short_table,
    "zeros-and-integers": zeros_and_integers,
    "guides": guides_table,
    "recipe": recipe_reference,
    "quickstart": quickstart_table,
    "quickstart_decoder": quickstart_decoder_table,
    "family": family_table,
    "ablation": ablation_table,
    "pareto": pareto_table,
    "retrieval": of_result("retrieval")(retrieval_table),
    "retrieval_longer": of_result("retrieval_longer")(retrieval_table),
    "retrieval_queries": of_result("retrieval_queries")(retrieval_table),
    "architectures": of_result("architectures")(architectures_table),
    "architectures_depth": of_result("architectures_depth")(architectures_table),
    "decoder_speed": decoder_speed_table,
    "decoder_family": decoder_family_table,
    "compound": compound_table,
    "compound_tables": compound_targets_table,
    "sparsity_accuracy": sparsity_accuracy_table,
    "int8": int8_table,
    "int8_ranges": int8_ranges_table,
    "figures": figures_with_goals,
}


def fill(text: str) -> str:
    """``text`` with every marked table made anew.

    Raises:
        ValueError: a marker has no end, or names no table.
    """
    filled, rest = "", text
    while mark := MARK.search(rest):
        name, end = mark[1], f"<!-- end:{mark[1]} -->"
        if name not in TABLES or end not in rest[mark.end() :]:
            raise ValueError(f"expected a known table with an end marker, found {name!r}; known: {', '.join(TABLES)}")
        filled += f"{rest[: mark.end()]}\n{TABLES[name]()}\n{end}"
        rest = rest[mark.end() :].partition(end)[2]
    return filled + rest


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is stale")
    options = parser.parse_args()
    stale = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                write_text(path, filled)
    if options.check:
        print(f"stale: {', '.join(stale)}; run python benchmarks/tables.py" if stale else "all documents are current")
        return int(bool(stale))
    print(f"filled: {', '.join(stale) or 'nothing has changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
