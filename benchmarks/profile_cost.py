"""What a full BERT-base latency table costs: 13 head counts, 45 widths, batch 1, 128 tokens, 1 thread.

Figure ``bert_base_table_seconds``: building, exporting, loading and measuring, engine start included.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from common import Figure, load_average, write_result
from shapes import SHAPES, dense_model

from ziplm_deploy.latency.profile import measure_table
from ziplm_deploy.latency.request import TableRequest
from ziplm_deploy.recipe import Environment, ExportConfig, ProfileConfig, Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="bert-base")
    parser.add_argument("--save-table", type=Path, help="also write the table there")
    parser.add_argument("--max-rounds", type=int, default=ProfileConfig().max_rounds)
    parser.add_argument("--output", type=Path, help="result file; default benchmarks/results/profile_cost.json")
    options = parser.parse_args()
    # Alignment 1 keeps all 45 widths of the published level list apart.
    profile = ProfileConfig(width_align=1, max_rounds=options.max_rounds, min_rounds=min(15, options.max_rounds))
    environment = Environment(threads=1, workload=Workload(batch_size=1, seq_len=128))
    load_before = load_average()
    model = dense_model(SHAPES[options.shape])
    table = measure_table(TableRequest(model, ("last_hidden_state",), environment, profile, ExportConfig()))
    if options.save_table is not None:
        table.save(options.save_table)
    rows = [cell.model_dump() for cell in table.cells]
    sizes = {kind: len(table.sizes(kind)) for kind in ("attention", "ffn")}
    seconds = Figure(table.total_seconds, "s", "<= 300", n=len(rows))
    settings = {
        "shape": dataclasses.asdict(SHAPES[options.shape]),
        "profile": profile.model_dump(mode="json"),
        "environment": environment.fingerprint,
        "cells": sizes,
        "measuring_seconds": table.measuring_seconds,
        "load_average_before": load_before,
        "noise": table.noise,
        "base_ms": table.base.median_ms,
        "dense_ms": table.dense.median_ms,
    }
    figures = {f"{options.shape.replace('-', '_')}_table_seconds": seconds}
    write_result("profile_cost", figures, rows, settings, options.output)


if __name__ == "__main__":
    main()
