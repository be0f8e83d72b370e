"""Recipes, data and files of whole runs on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tests.helpers.gguf_models import byte_level_tokenizer
from tests.helpers.models import VOCABULARY, tiny_causal_model, tiny_tokenizer
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Recipe, parse_recipe

WORDS = VOCABULARY[5:]
QUICK_BENCHMARK: dict[str, Any] = {
    "rounds": 5,
    "processes": 2,
    "max_processes": 2,
    "runs_per_round": 1,
    "max_seconds": 10,
    "max_corrections": 0,
    "median_length": False,
    "baselines": [],  # what users get without pruning: test_baselines
}


def write_rows(path: Path, n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    rows = [
        {"text": " ".join(rng.choice(WORDS, size=rng.integers(3, 12))), "label": int(rng.integers(3))} for _ in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def raw_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "task": "text-classification"},
        "data": {
            "calibration": str(folder / "train.jsonl"),
            "evaluation": str(folder / "test.jsonl"),
            "n_calibration": 64,
        },
        "environment": {"workload": {"seq_len": 32}},
        "speedups": [1.5],
        "profile": {"stack_depth": 2, "width_ratio": 0.5, "min_rounds": 3, "max_rounds": 4, "max_seconds": 5},
        "prune": {"search": {"n_sequences": 16, "n_rerank": 16, "coefficient_steps": 3, "swap_evaluations": 6}},
        # these models take microseconds: the loop's job is tested in test_closed_loop, here it may miss
        "benchmark": dict(QUICK_BENCHMARK),
    }
    for section, fields in changes.items():
        raw[section] = {**raw.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return raw


def causal_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Recipe of a tiny causal language model, with the text that it reads; see :func:`save_causal`."""
    text = str(folder / "text.txt")
    fields: dict[str, Any] = {
        "model": {"task": "text-generation"},
        "environment": {"workload": {"prefill": 12, "decode": 4}},
        "data": {"calibration": text, "evaluation": text, "context": 16, "n_evaluation": 12},
    }
    raw = raw_recipe(folder)
    raw["environment"] = {}
    for section, values in (*fields.items(), *changes.items()):
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return raw


def save_causal(folder: Path, model_type: str = "llama", **changes: Any) -> nn.Module:
    """Checkpoint of a tiny causal language model in ``folder/model``, and 1,400 words of text."""
    words = np.random.default_rng(0).choice(WORDS, size=1400)
    (folder / "text.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    model = tiny_causal_model(model_type, **{"hidden_size": 64, **changes})
    stored = transformers.AutoModelForCausalLM.from_config(model.config)  # GPT-2 stores its linears transposed
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            tensor = model.get_parameter(name)
            parameter.copy_(tensor.T if tensor.dim() == 2 and ".c_" in name else tensor)
    stored.save_pretrained(folder / "model")
    tiny_tokenizer(folder / "words").save_pretrained(folder / "model")
    return model


def save_byte_level(folder: Path, **changes: Any) -> nn.Module:
    """Checkpoint and text as of :func:`save_causal`, of a Llama whose tokenizer GGUF can hold."""
    tokenizer = byte_level_tokenizer()
    ids = {"eos_token_id": 136, "pad_token_id": 136, "bos_token_id": 136}
    model = save_causal(folder, vocab_size=len(tokenizer), **ids, **changes)
    tokenizer.save_pretrained(folder / "model")
    return model


def recipe(folder: Path, **changes: Any) -> Recipe:
    return parse_recipe(raw_recipe(folder, **changes))


def stamps(folder: Path) -> dict[str, int]:
    run_dir = folder / "runs" / "tiny"
    return {str(p.relative_to(run_dir)): p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}


def written_again(folder: Path, changed: Recipe) -> set[str]:
    before = stamps(folder)
    run_pipeline(changed)
    return {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}
