"""Do tables, files and databases hold for every family of encoders at real shapes? One row a family.

For each family a dense model with random weights is built at the shapes of a model that people use (vocabularies cut:
what looks up a word costs the same for any), its table is measured, random non-uniform models are drawn from its levels
and exported, compared with torch and timed by the product's own benchmark.
Figures: ``families``; ``largest_difference`` between file and torch, over all models drawn; ``worst_deviation_percent``
and ``median_deviation_percent`` of |predicted / measured - 1| over all models, with intervals as in ``additivity``.
``--layers`` bounds the depth, which a row names beside that of the real model; ``--database-layers`` says how many
layers the database is timed on. What a release of transformers does not have is left out and named.
``--output …/architectures_depth.json`` keeps a run of its own: a few families at full depth.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from additivity import benchmark_config, deviation_bounds, draw_sizes, profile_config
from common import Figure, load_average, write_result
from torch import nn

from exporters import dummy_inputs
from exporters.heads import patches_of
from exporters.parity import check_parity
from ziplm_deploy.latency.benchmark import compare
from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.latency.table import LatencyTable
from ziplm_deploy.models.adapted import adapted, model_class
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.deployed import export_settings, write_graph
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.models.resizing import random_resized
from ziplm_deploy.pruning.calibration import collect_statistics
from ziplm_deploy.pruning.database import build_database
from ziplm_deploy.pruning.planner import database_sizes
from ziplm_deploy.recipe import Environment, ExportConfig, PruneConfig, Workload

OUTPUTS = ("last_hidden_state",)
SLOWEST, FASTEST, OF_LARGEST = 1.5, 8.0, 0.8  # speedups of the models drawn; of the largest that the table knows
LARGEST_DIFFERENCE = 1e-4
ENOUGH = ">= 12"  # families
ROWS = 8  # of a batch for the database
VOCABULARY = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
IMAGE = {"image_size": 224, "num_channels": 3}


@dataclass(frozen=True)
class Family:
    """Shapes of a model that people use; ``layers`` is its depth."""

    like: str
    model_type: str
    layers: int
    settings: Mapping[str, Any]
    seq_len: int = 128


FAMILIES = (
    Family("BGE-base", "bert", 12, BASE | VOCABULARY),
    Family("multilingual-E5-base", "xlm-roberta", 12, BASE | VOCABULARY | {"max_position_embeddings": 514}),
    Family("all-mpnet-base", "mpnet", 12, BASE | VOCABULARY),
    Family("DistilBERT", "distilbert", 6, {"dim": 768, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 1000}),
    Family("ModernBERT-base", "modernbert", 22, BASE | VOCABULARY | {"intermediate_size": 1152}),
    Family("nomic-embed-text", "nomic_bert", 12, BASE | VOCABULARY),
    Family("gte-base", "gte", 12, BASE | VOCABULARY),
    Family("EuroBERT-210m", "eurobert", 12, BASE | VOCABULARY | {"num_key_value_heads": 12}),
    Family(
        "DeBERTa-v3-base",
        "deberta-v2",
        12,
        {
            **BASE,
            "vocab_size": 1000,
            "pad_token_id": 0,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    Family(
        "sentence-t5-base",
        "t5",
        12,
        {"d_model": 768, "num_heads": 12, "d_kv": 64, "d_ff": 3072, "vocab_size": 1000, "pad_token_id": 0},
    ),
    Family("DeiT-base", "deit", 12, BASE | IMAGE | {"patch_size": 16}),
    Family("DINOv2-small", "dinov2", 12, {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14} | IMAGE),
    Family(
        "CLIP ViT-B/32, texts",
        "clip_text_model",
        12,
        {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "max_position_embeddings": 77}
        | VOCABULARY,
        seq_len=77,
    ),
    Family("CLIP ViT-B/32, images", "clip_vision_model", 12, BASE | IMAGE | {"patch_size": 32}),
    Family(
        "SigLIP-base, texts", "siglip_text_model", 12, BASE | VOCABULARY | {"max_position_embeddings": 64}, seq_len=64
    ),
    Family(
        "Qwen3-Embedding-0.6B",
        "qwen3",
        28,
        {
            **VOCABULARY,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
        },
    ),
)
BY_NAME = {family.like: family for family in FAMILIES}


def dense_model(family: Family, layers: int, seed: int) -> nn.Module:
    """A model of these shapes and so many layers, with random weights."""
    config: Any = transformers.AutoConfig.for_model(family.model_type, **family.settings)
    name = architecture_of(config).config_layers
    config = transformers.AutoConfig.for_model(family.model_type, **family.settings, **{name: layers})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return adapted(model_class(config, "AutoModel")(config).eval())


def run_family(family: Family, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The family's row, and those of its models."""
    layers = min(family.layers, options.layers or family.layers)
    environment = Environment(threads=1, workload=Workload(batch_size=1, seq_len=family.seq_len))
    export, load_before = ExportConfig(), load_average()
    dense = dense_model(family, layers, options.seed)
    request = TableRequest(dense, OUTPUTS, environment, profile_config(options), export)
    table = measure_table(request)
    settings = export_settings(export, environment.workload)
    generator = np.random.default_rng(options.seed)
    targets = np.geomspace(SLOWEST, min(FASTEST, OF_LARGEST * table.largest_speedup()), options.models)
    plans = {f"model {index}": draw_sizes(table, float(target), generator) for index, target in enumerate(targets)}
    differences = []
    with tempfile.TemporaryDirectory(prefix="ziplm-architectures-") as folder:
        files = {"dense": Path(folder) / "dense.onnx"}
        write_graph(dense, files["dense"], list(OUTPUTS), settings, request.form)
        for name, sizes in plans.items():
            files[name] = Path(folder) / f"{name.replace(' ', '-')}.onnx"
            resized = random_resized(dense, sizes).eval()
            write_graph(resized, files[name], list(OUTPUTS), settings, request.form)
            for given in (settings, replace(settings, shapes="static")):  # short requests, and those of the workload
                differences.append(check_parity(resized, files[name], dummy_inputs(resized, given), atol=1.0))
        record = compare(files, environment, benchmark_config(options), "dense")
    models = []
    for name, sizes in plans.items():
        measured, predicted = record.variant(name), table.dense.median_ms / table.predict_ms(sizes)
        models.append(
            {
                "family": family.like,
                "model": name,
                "predicted_speedup": predicted,
                "measured_speedup": measured.speedup,
                "measured_low": measured.speedup_low,
                "measured_high": measured.speedup_high,
                "deviation_percent": 100 * abs(predicted / measured.speedup - 1),
                "sizes": sizes,
            }
        )
    deviations = [each["deviation_percent"] for each in models]
    row = {
        "family": family.like,
        "model_type": family.model_type,
        "layers": layers,
        "layers_of_real_model": family.layers,
        "largest_difference": max(differences),
        "worst_deviation_percent": max(deviations),
        "median_deviation_percent": float(np.median(deviations)),
        "dense_ms": table.dense.median_ms,
        "table_seconds": table.total_seconds,
        "table_noise": table.noise,
        "aa_ratio": [record.aa_ratio, record.aa_low, record.aa_high],
        "load_average_before": load_before,
    }
    if options.database_layers:
        row["database_layers"] = min(options.database_layers, layers)
        row["database_seconds"] = database_seconds(family, row["database_layers"], table, options)
    return row, models


def database_seconds(family: Family, layers: int, table: LatencyTable, options: argparse.Namespace) -> float:
    """Seconds of statistics and levels of so many layers, from random inputs of ``options.tokens`` tokens."""
    model = dense_model(family, layers, options.seed)
    batches = random_batches(model, family, options)
    began = time.monotonic()
    modules = prunable_modules(model)
    statistics = collect_statistics(model, batches, modules, memory_limit_bytes=8 * 2**30)
    build_database(model, statistics, database_sizes(model, table), PruneConfig(), seed=options.seed)
    return time.monotonic() - began


def random_batches(model: nn.Module, family: Family, options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Batches of other random inputs each, of at least ``options.tokens`` tokens or patches together."""
    config: Any = model.config
    workload = Workload(batch_size=ROWS, seq_len=family.seq_len)
    given = dummy_inputs(model, export_settings(ExportConfig(shapes="static"), workload))
    tokens = patches_of(config) + 1 if "pixel_values" in given else family.seq_len
    generator = torch.Generator().manual_seed(options.seed)
    batches = []
    for _ in range(math.ceil(options.tokens / (ROWS * tokens))):
        if "pixel_values" in given:
            drawn = {"pixel_values": torch.randn(given["pixel_values"].shape, generator=generator)}
        else:  # above the ids that mean something
            ids = torch.randint(3, config.vocab_size, given["input_ids"].shape, generator=generator)
            drawn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append({**given, **drawn})
    return batches


def figures_of(rows: list[dict[str, Any]], models: list[dict[str, Any]], enough: str) -> dict[str, Figure]:
    """Figures over all families; ``enough``: goal for their number."""
    deviations = np.array([each["deviation_percent"] for each in models])
    bounds = np.array([deviation_bounds(each, "") for each in models])
    figures = {
        "families": Figure(len(rows), "", enough, len(rows)),
        "largest_difference": Figure(
            max(row["largest_difference"] for row in rows), "", f"<= {LARGEST_DIFFERENCE:g}", len(models)
        ),
    }
    for name, summary, goal in (("worst", np.max, "<= 5"), ("median", np.median, "")):
        per_family = [row[f"{name}_deviation_percent"] for row in rows]
        figures[f"{name}_deviation_percent"] = Figure(
            float(summary(deviations)),
            "%",
            goal,
            len(models),
            (min(per_family), max(per_family)),
            (float(summary(bounds[:, 0])), float(summary(bounds[:, 1]))),
        )
    return figures


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--models", type=int, default=6, help="random models a family")
    parser.add_argument("--layers", type=int, default=0, help="at most so many layers; 0: as the real model")
    parser.add_argument("--database-layers", type=int, default=1, help="layers of the timed database; 0: none")
    parser.add_argument("--tokens", type=int, default=4096, help="random tokens of its statistics, at least")
    parser.add_argument("--precision", type=float, default=0.01, help="of the table's medians")
    parser.add_argument("--table-rounds", type=int, default=60)
    parser.add_argument("--table-seconds", type=float, default=150.0)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--runs-per-round", type=int, default=1)
    parser.add_argument("--benchmark-seconds", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/architectures.json")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    rows: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    left_out = []
    for name in options.families:
        family = BY_NAME[name]
        if family.model_type not in transformers.CONFIG_MAPPING:
            left_out.append(f"{name}: transformers {transformers.__version__} has no {family.model_type}")
            continue
        row, of_family = run_family(family, options)
        gc.collect()
        rows.append(row)
        models += of_family
        print(
            f"{name}: difference {row['largest_difference']:.1e}, worst {row['worst_deviation_percent']:.2f} %, table "
            f"{row['table_seconds']:.0f} s",
            file=sys.stderr,
        )
        settings = {
            "left_out": left_out,
            "models": models,
            "profile": profile_config(options).model_dump(mode="json"),
            "benchmark": benchmark_config(options).model_dump(),
            "seed": options.seed,
        }
        # after every family: a long run that is stopped keeps what it has
        name = "architectures" if options.output is None else options.output.stem
        enough = ENOUGH if name == "architectures" else ""
        write_result(name, figures_of(rows, models, enough), rows, settings, options.output)


if __name__ == "__main__":
    main()
