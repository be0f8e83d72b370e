"""Search by a family of embedding models: nDCG@10 of SQuAD's validation questions among all its paragraphs.

``python benchmarks/retrieval.py --data FOLDER`` runs one recipe, as ``ziplm-deploy run`` would, and writes
``benchmarks/results/retrieval.json``. FOLDER holds ``squad/validation.jsonl.gz``, which is searched, and
``squad/train_first44.jsonl.gz``, whose questions and paragraphs calibrate and train: other articles, and no labels.
Symmetric: a member embeds questions and paragraphs. Asymmetric: the dense model has embedded the paragraphs.
``--steps 0`` leaves members as pruned. A short trial: ``--questions 100 --rows 400 --calibration 256 --steps 2
--targets 2 --seq-len 64 --quick``.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accuracy import percent_figure, percent_row
from common import RESULTS, ROOT, Figure, load_average, write_result
from family import MODEL

from ziplm_deploy.api import run_recipe
from ziplm_deploy.artifacts import write_text
from ziplm_deploy.progress import ConsoleProgress
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.reporting.records import FamilyReport, FileReport, MemberReport
from ziplm_deploy.tasks.ranking import ASYMMETRIC, NDCG
from ziplm_deploy.tasks.retrieval_scores import FileRetrieval

TARGETS = (2.0, 3.0, 4.0, 6.0)
KINDS = {"symmetric": NDCG, "asymmetric": f"{ASYMMETRIC}{NDCG}"}
GOALS = {"asymmetric_percent_of_dense_3x": ">= 99"}
# Of a trial, whose latencies mean nothing.
QUICK: dict[str, Any] = {
    "profile": {"stack_depth": 2, "width_ratio": 0.5, "min_rounds": 3, "max_rounds": 4, "max_seconds": 10},
    "prune": {"search": {"n_sequences": 16, "n_rerank": 16, "coefficient_steps": 3, "swap_evaluations": 6}},
    "benchmark": {"rounds": 5, "processes": 2, "max_processes": 2, "max_seconds": 10, "max_corrections": 0},
}


def read_rows(path: Path, count: int | None) -> Iterator[dict[str, Any]]:
    """The first rows of a file of SQuAD; all for None."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, itertools.islice(stream, count))


def texts_file(options: argparse.Namespace) -> Path:
    """Distinct questions, and paragraphs unless ``--queries-only``, of the training articles, one text a line."""
    rows = list(read_rows(options.data / "squad" / "train_first44.jsonl.gz", options.rows))
    kinds = ["question"] if options.queries_only else ["context", "question"]
    texts = dict.fromkeys(row[kind].strip() for kind in kinds for row in rows)
    path: Path = options.work.resolve() / "texts.jsonl"
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    return path


def search_file(options: argparse.Namespace) -> Path:
    """Questions with their paragraphs."""
    path: Path = options.work.resolve() / "search.jsonl"
    rows = read_rows(options.data / "squad" / "validation.jsonl.gz", options.rows)
    write_text(path, "".join(json.dumps({"query": row["question"], "passage": row["context"]}) + "\n" for row in rows))
    return path


def recipe_of(options: argparse.Namespace) -> Recipe:
    """One family, trained gradually unless ``--steps`` is 0."""
    recover = {
        "mode": "gradual",
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "token_weight": options.token_weight,
        "logit_weight": options.logit_weight,
        "precision": options.precision,
    }
    stsb = options.data / "stsb" / "validation.jsonl.gz"
    raw = {
        "name": "retrieval",
        "output_dir": str(options.work),
        "seed": options.seed,
        "model": {"path": options.model, "task": "sentence-similarity"},
        "data": {
            "calibration": str(texts_file(options)),
            "retrieval": str(search_file(options)),
            "n_retrieval": options.questions,
            "n_calibration": options.calibration,
            "evaluation": str(stsb.resolve()) if stsb.exists() else None,
        },
        "environment": {"threads": 1, "workload": {"batch_size": 1, "seq_len": options.seq_len}},
        "speedups": list(options.targets),
        "recover": recover if options.steps else {"mode": "none"},
        **(QUICK if options.quick else {}),
    }
    raw["profile"] = {**raw.get("profile", {}), "table": options.table}
    return parse_recipe(raw, source="retrieval")


def rows_of(report: FamilyReport) -> list[dict[str, Any]]:
    """One row a model, dense first."""
    assert report.retrieval is not None
    return [row_of(report, member, report.retrieval.files[member.name]) for member in report.members]


def row_of(report: FamilyReport, member: MemberReport, found: FileRetrieval) -> dict[str, Any]:
    """What a model's ``model.onnx`` finds, beside its speedup and its score on pairs."""
    file: FileReport = member.served
    return {
        "model": member.name,
        "target": member.speedup_target,
        "measured_speedup": file.measured_speedup,
        "measured_low": file.measured_low,
        "measured_high": file.measured_high,
        "verdict": member.verdict,
        "parameters": member.parameters,
        report.metric: file.accuracy.get(report.metric),
        f"{report.metric}_of_dense": percent_row(file.of_dense.get(report.metric)),
        **{kind: kind_row(found, metric) for kind, metric in KINDS.items()},
        "training": None if member.training is None else member.training.model_dump(mode="json"),
    }


def kind_row(found: FileRetrieval, metric: str) -> dict[str, Any]:
    """Score with its interval, and what it is of dense."""
    low, high = found.intervals[metric]
    return {
        "score": found.scores[metric],
        "score_low": low,
        "score_high": high,
        **percent_row(found.of_dense.get(metric)),
    }


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Percent of dense of every member, both ways."""
    figures = {}
    for row in rows:
        for kind in KINDS:
            if row["target"] is not None and row[kind].get("percent_of_dense") is not None:
                name = f"{kind}_percent_of_dense_{row['target']:g}x"
                figures[name] = percent_figure(row[kind], GOALS.get(name, ""), row[kind]["n_examples"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with squad/, stsb/")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "retrieval", help="the run's folder is made here")
    parser.add_argument("--table", help="latency table of the same shapes, instead of measuring one")
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps a member; 0: no training")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--token-weight", type=float, default=0.5, help="of the layer-wise distance of tokens")
    parser.add_argument("--logit-weight", type=float, default=0.5, help="of the distance of embeddings")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens that are timed, and that texts are cut to")
    parser.add_argument(
        "--queries-only",
        action="store_true",
        help="calibrate and train on questions alone, as for an index that exists",
    )
    parser.add_argument("--calibration", type=int, default=512, help="texts for Hessians and search")
    parser.add_argument("--questions", type=int, help="how many are searched for; default: all")
    parser.add_argument("--rows", type=int, help="read only so many rows of each file, so fewer paragraphs, too")
    parser.add_argument("--quick", action="store_true", help="measure and search as little as can be, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the run folder")
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieval.json")
    options = parser.parse_args()
    recipe, load = recipe_of(options), load_average()
    report = run_recipe(recipe, ConsoleProgress())
    assert report.retrieval is not None
    settings = {
        "model": options.model,
        "environment": report.environment.describe(),
        "n_queries": report.retrieval.n_queries,
        "n_passages": report.retrieval.n_passages,
        "n_calibration": recipe.data.n_calibration,
        "queries_only": options.queries_only,
        "recover": recipe.recover.model_dump(mode="json"),
        "aa": [report.aa_ratio, report.aa_low, report.aa_high],
        "is_trial": options.quick,
        "stage_seconds": report.stage_seconds,
        "load_average_before": load,
    }
    rows = rows_of(report)
    write_result(options.output.stem, figures_of(rows), rows, settings, options.output)
    if not options.keep:
        shutil.rmtree(recipe.run_dir)


if __name__ == "__main__":
    main()
