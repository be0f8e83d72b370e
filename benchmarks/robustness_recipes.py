"""Recipes whose runs are killed by :mod:`robustness_kills`, and their tiny models and data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TRAINING = {"max_steps": 20, "batch_size": 8, "save_steps": 5}
LONG_ONLY = {"median_length": False}  # not on short requests, too
SETTLED = {**LONG_ONLY, "max_corrections": 1, "tolerance": 0.49, "overshoot": 100}  # by drafts, not by the loop
MODES: dict[str, dict[str, Any]] = {
    "one-shot": {"speedups": [1.4, 1.8], "benchmark": LONG_ONLY, "dense": {"train": True, **TRAINING}},
    "recovery": {"speedups": [1.4, 1.8], "recover": {"mode": "one-shot", **TRAINING}},
    "gradual": {"speedups": [1.4, 1.8], "benchmark": SETTLED, "recover": {"mode": "gradual", **TRAINING}},
    "compression": {
        "speedups": [1.4],
        "benchmark": LONG_ONLY,
        "recover": {"mode": "one-shot", **TRAINING},
        "compress": {
            "variants": ["int8", "sparse", "sparse-int8"],
            "int8": {"method": "static", "n_calibration": 16},
            "train": {"mode": "distil", **TRAINING},
        },
    },
    "baselines": {
        "speedups": [1.4],
        "environment": {"workload": {"seq_len": 40}},
        "benchmark": {"median_length": True, "baselines": ["onnxruntime-int8", "openvino-int8", "torch"]},
    },
    "retrieval": {
        "speedups": [1.4],
        "model": {"task": "sentence-similarity"},
        "data": {"evaluation": None, "retrieval": "search.jsonl"},
    },
    "generation": {
        "speedups": [1.2],
        "data": {"generated": {"n_windows": 64, "batch_size": 16}, "n_calibration": 48},
        "recover": {"mode": "one-shot", "lora": {"rank": 4}, **TRAINING},
        "compress": {"variants": ["int8"], "int8": {"weight_only_4": ["*.feed_forward.up"]}},
        "export": {"gguf": "Q8_0", "genai": True},
    },
}


def prepared(folder: Path, mode: str) -> dict[str, Any]:
    """Write model and data of a mode into ``folder``; returns its recipe."""
    from tests.helpers.models import save_dense, sentences
    from tests.helpers.pipeline import causal_recipe, raw_recipe, save_byte_level, write_rows
    from tests.helpers.sentence_models import TinySentenceModel

    if mode == "generation":
        save_byte_level(folder, intermediate_size=128)
        raw = causal_recipe(folder, **MODES[mode])
        del raw["data"]["calibration"]
        return raw
    raw = raw_recipe(folder, **MODES[mode])
    if mode == "retrieval":
        TinySentenceModel(normalize=True).save(folder / "model")
        texts = list(dict.fromkeys(sentences(160)))
        rows = [{"query": " ".join(text.split()[:3]), "passage": text} for text in texts]
        for name, lines in (("train", [{"text": text} for text in texts]), ("search", rows)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        raw["data"]["retrieval"] = str(folder / raw["data"]["retrieval"])
        return raw
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    save_dense(folder / "model", task="text-classification", **sizes)
    for name, seed in (("train", 0), ("test", 1)):
        write_rows(folder / f"{name}.jsonl", 80, seed)
    return raw


def kind_of(stage: str) -> str:
    """A stage's name without that of the member: ``evaluate 1.4x sparse``, ``evaluate dense sparse`` are one kind."""
    return re.sub(r"\b(dense|\d[\d.]*x)(?= |$)", "*", stage)
