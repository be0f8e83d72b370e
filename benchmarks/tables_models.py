"""Tables of what model families and decoders do, for the documents."""

from __future__ import annotations

from typing import Any

from common import of_result, place_text

from ziplm_deploy.reporting.table import MISSING, markdown_table


def architectures_table(result: dict[str, Any]) -> str:
    """A row a family: how far files and predictions are off, what table and database take."""
    cells = []
    for row in result["rows"]:
        depth, whole = row["layers"], row["layers_of_real_model"]
        database = row.get("database_seconds")
        timed = row.get("database_layers")
        layers = (
            MISSING if not timed else f"{database:.0f} s" if timed == whole else f"{database / timed:.1f} s a layer"
        )
        cells.append(
            [
                row["family"],
                f"`{row['model_type']}`",
                str(depth) if depth == whole else f"{depth} of {whole}",
                f"{row['largest_difference']:.1e}",
                f"{row['median_deviation_percent']:.1f} %",
                f"{row['worst_deviation_percent']:.1f} %",
                f"{row['table_seconds']:.0f} s",
                layers,
            ]
        )
    titles = ["shapes of", "type", "layers", "difference", "median deviation", "worst", "table", "database"]
    n_models = len(result["settings"]["models"])
    text = (
        f"{n_models} random models, random weights: largest difference of a file's answers from torch's, predicted "
        f"against measured speedup. {place_text(result)}"
    )
    return "\n".join([*markdown_table(titles, cells), "", text])


@of_result("decoder_speed")
def decoder_speed_table(result: dict[str, Any]) -> str:
    """Tokens a second of every file and engine in one interleaved run."""
    cells = [
        [
            row["name"],
            MISSING if row["perplexity"] is None else f"{row['perplexity']:.2f}",
            f"{row['prefill_tokens_per_second']:.0f}",
            _spread(row, "prefill_ms"),
            f"{row['decode_tokens_per_second']:.1f}",
            _spread(row, "decode_ms"),
        ]
        for row in result["rows"]
    ]
    titles = ["model", "perplexity", "prefill tokens/s", "ms", "decode tokens/s", "ms a token"]
    settings = result["settings"]
    text = (
        f"One thread, prompts of {settings['prefill']} tokens; brackets hold the least and the most of the rounds. "
        f"{place_text(result)}"
    )
    return "\n".join([*markdown_table(titles, cells), "", text])


def _spread(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_spread"]
    return f"{row[name]:.1f} [{low:.1f}, {high:.1f}]"


@of_result("decoder_family")
def decoder_family_table(result: dict[str, Any]) -> str:
    """Perplexity of every method's models, with the speed that was measured."""
    rows = sorted(result["rows"], key=lambda row: (row["method"] != "ziplm", row["method"], row["seed"], row["target"]))
    several = len({row["seed"] for row in rows}) > 1
    cells = [
        [
            row["method"] + (f", seed {row['seed']}" if several else ""),
            f"{row['target']:g}x",
            f"{row['predicted_speedup']:.2f}x",
            f"{row['measured_speedup']:.2f}x [{row['measured_low']:.2f}, {row['measured_high']:.2f}]",
            f"{row['perplexity']:.2f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.1e}",
            f"{row['perplexity_recovered']:.2f}" if "perplexity_recovered" in row else MISSING,
        ]
        for row in rows
    ]
    titles = ["method", "target", "predicted", "measured [95 %]", "perplexity", "after training"]
    settings = result["settings"]
    options, dense = settings["options"], result["figures"]["perplexity_dense"]["value"]
    trained = [row["recovery"] for row in rows if "recovery" in row]
    training = ""
    if trained:
        steps, minutes = trained[0]["steps"], " and ".join(f"{each['minutes']:.0f}" for each in trained)
        training = f"Training: {steps} steps of {trained[0]['tokens'] / steps:.0f} tokens, {minutes} minutes. "
    runs = [f"Seed {', '.join(map(str, run['seeds']))}: {place_text(run)}" for run in settings.get("runs", [])]
    places = " ".join(runs) or place_text(result)
    text = (
        f"Requests of {options['prefill']} tokens and {options['decode']} generated, one thread. Perplexity of the "
        f"first {settings['evaluation_tokens']:,} tokens of WikiText-2's test set, dense {dense:.2f}; calibration on "
        f"{settings['calibration_tokens']:,} tokens of the validation set. {training}{places}"
    )
    return "\n".join([*markdown_table(titles, cells), "", text])
