"""Tables of zeros and integers, for :mod:`tables`."""

from __future__ import annotations

from typing import Any

from accuracy import percent_of_dense_text, percent_text, points_lost_text
from common import cpu_text, interval_text, of_result, place_text

from ziplm_deploy.reporting.table import MISSING, markdown_table


@of_result("compound")
def zeros_and_integers(result: dict[str, Any]) -> str:
    """What INT8 brings to a pruned model on the default engine, and zeros to the same model on DeepSparse."""
    found = {
        (row["member"], row["variant"], row["engine"]): row for row in result["rows"] if row["task"] == "banking77"
    }
    dense = found["dense", "fp32", "onnxruntime"]["score"]

    def figure(variant: str, engine: str) -> str:
        row = found["4x", variant, engine]
        speedup = interval_text(row["speedup"], row["low"], row["high"])
        kept = percent_of_dense_text({"percent_of_dense": 100 * row["score"] / dense, **row})
        return f"{speedup} at {kept} ({engine}, {row['onnx_bytes'] / 1e6:.1f} MB)"

    of_two = "" if "percent_low" in found["4x", "fp32", "onnxruntime"] else "; intervals of two processes, too narrow"
    return (
        f"A banking77 classifier pruned to 4x: {figure('fp32', 'onnxruntime')}; INT8 on top: "
        f"{figure('int8', 'onnxruntime')}; zeros and INT8: {figure('sparse-int8', 'deepsparse')}. Speedup over dense "
        f"float32 ONNX Runtime and percent of its accuracy; 1 thread, {cpu_text(result['machine'])}, "
        f"{result['date'][:10]}; one seed{of_two}."
    )


@of_result("compound")
def compound_table(result: dict[str, Any]) -> str:
    """Every form of every committed compound model on every engine: speedup and, where there are weights, accuracy."""
    engines = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    found = {(row["task"], row["member"], row["variant"], row["engine"]): row for row in result["rows"]}
    cells = []
    for task, member, variant in dict.fromkeys(key[:3] for key in found):
        own = [found[task, member, variant, engine] for engine in engines]
        cells.append([task, member, variant, *map(_speedup_and_score, own)])
    caption = (
        f"Speedup over dense float32 ONNX Runtime in the same run, and accuracy on that engine. Batch 1 where no other "
        f"is named, 128 tokens, 1 thread, {cpu_text(result['machine'])}, "
        f"{result['date'][:10]}; one seed. The dense model against itself in the same run: "
        + ", ".join("{:.3f} [{:.3f}, {:.3f}]".format(*part["timing"]["aa"]) for part in result["settings"].values())
        + "."
    )
    return "\n".join([*markdown_table(["task", "pruned to", "form", *engines], cells), "", caption])


def _speedup_and_score(row: dict[str, Any]) -> str:
    if row.get("refused"):
        return "not run by it"
    speedup = f"{row['speedup']:.2f}x"
    if "score" not in row:
        return speedup
    kept = f" ({percent_of_dense_text(row)})" if row.get("percent_low") is not None else ""
    return f"{speedup}, {row['score']:.4f}{kept}"


@of_result("int8")
def int8_table(result: dict[str, Any]) -> str:
    """Every way to INT8 of every committed model: what it costs and what it brings."""
    cells = [
        [
            row["model"],
            row["form"],
            row["engine"],
            f"{row['score']:.4f}",
            points_lost_text(row),
            interval_text(row["speedup"], row["low"], row["high"]),
            f"{row['onnx_bytes'] / 1e6:.1f}",
        ]
        for row in result["rows"]
    ]
    titles = ["model", "form", "engine", "accuracy", "points lost", "over float32 [95 %]", "ONNX MB"]
    return "\n".join([*markdown_table(titles, cells), "", place_text(result)])


@of_result("compound_tables")
def compound_targets_table(result: dict[str, Any]) -> str:
    """Compound targets, searched with a table in the deployed form and with a float32 table."""
    cells = [
        [
            f"{row['target']:g}x",
            row["table"],
            interval_text(row["measured_speedup"], row["low"], row["high"]),
            f"{row['error_percent']:+.1f} %",
            str(row["corrections"]),
            f"{row['score']:.4f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["target"])
    ]
    titles = ["target", "table", "measured [95 %]", "off by", "corrections", "accuracy"]
    return "\n".join([*markdown_table(titles, cells), "", place_text(result)])


@of_result("sparsity_accuracy")
def sparsity_accuracy_table(result: dict[str, Any]) -> str:
    """What zeros cost a classifier: in one pass, in several with Hessians collected anew, and trained after one."""
    cells = [
        [
            f"{100 * row['sparsity']:.0f} %",
            str(row["passes"]),
            str(row["trained_steps"] or MISSING),
            f"{row['score']:.4f}",
            percent_text(100 * row["score"] / result["settings"]["dense_score"]),
        ]
        for row in result["rows"]
    ]
    titles = ["zeros", "passes", "steps of training", "accuracy", "of dense"]
    return "\n".join([*markdown_table(titles, cells), "", place_text(result)])


@of_result("int8_ranges")
def int8_ranges_table(result: dict[str, Any]) -> str:
    """What counts when ranges are calibrated: real tokens, or every position of padded batches; means over seeds."""
    figures = result["figures"]

    def text(name: str) -> str:
        figure = figures[name]
        low, high = figure["spread"]
        return f"{figure['value']:.4f} [{low:.4f}, {high:.4f}]"

    cells = [
        [method, counted, *(text(f"{method}_{counted}_{metric}") for metric in ("spearman", "mean_cosine"))]
        for method, counted in dict.fromkeys((row["ranges"], row["counted"]) for row in result["rows"])
    ]
    titles = ["ranges", "of", "Spearman", "cosine to float32"]
    caption = (
        f"Means over {len(result['settings']['seeds'])} seeds of {result['settings']['n_calibration']} calibration "
        f"sentences, with the smallest and the largest; {result['settings']['n_evaluation']} pairs, on which float32 "
        f"has {figures['float32_spearman']['value']:.4f}. {place_text(result)}"
    )
    return "\n".join([*markdown_table(titles, cells), "", caption])
