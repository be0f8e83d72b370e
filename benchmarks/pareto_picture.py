"""Draw README's picture from the committed result: ``python benchmarks/pareto_picture.py``. Measures nothing.

Percent of the dense score over measured speedup, one panel a task, every method after the same training. Horizontal
bars are the intervals of the measured speedups.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ziplm"
NAMES = {OURS: "ziplm-deploy"}
RIVALS = {"flap": ("#1b7837", "s"), "magnitude": ("#2166ac", "^"), "layer-drop": ("#b35806", "v")}
OTHER = ("#762a83", "D")
WHOLE_LAYERS = {"layer-drop": "drop whole layers", "3-layer student": "3-layer student"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of all rows of ``pareto.json`` as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "pareto", "font.size": 10, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "font.family": "DejaVu Sans"})
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(7.2 * len(tasks), 3.9), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        own = [row for row in rows if row["task"] == task]
        for method in dict.fromkeys(row["method"] for row in own):
            _curve(axis, method, [row for row in own if row["method"] == method])
        axis.axhline(100, color="#999999", linewidth=0.8, linestyle=":")
        axis.plot([1.0], [100], marker="*", markersize=13, color="black", linestyle="")
        axis.annotate("dense", (1.0, 100), xytext=(8, -14), textcoords="offset points")
        axis.set(xlabel="measured speedup over dense ONNX Runtime float32", xlim=(0.9, 3.35))
        axis.set(ylabel=f"% of the dense {own[0]['metric'].capitalize()} correlation")
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def _curve(axis: Any, method: str, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["measured_speedup"])
    speedups = [row["measured_speedup"] for row in rows]
    color, marker = ("#d6001c", "o") if method == OURS else RIVALS.get(method, OTHER)
    axis.errorbar(
        speedups,
        [row["percent_of_dense"] for row in rows],
        xerr=[
            [row["measured_speedup"] - row["measured_low"] for row in rows],
            [row["measured_high"] - row["measured_speedup"] for row in rows],
        ],
        color=color,
        marker=marker,
        markersize=7 if method == OURS else 6,
        linewidth=2.2 if method == OURS else 1.2,
        elinewidth=1.0,
        linestyle="-" if method not in WHOLE_LAYERS else "--",
        label=NAMES.get(method, WHOLE_LAYERS.get(method, method)),
        zorder=3 if method == OURS else 2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "pareto.svg", help="picture")
    options = parser.parse_args()
    result = json.loads((RESULTS / "pareto.json").read_text(encoding="utf-8"))
    draw(result["rows"], options.output)


if __name__ == "__main__":
    main()
