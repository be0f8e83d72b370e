"""The whole way for every architecture and every task, on tiny models with the real engine. Slow: minutes."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.models import VOCABULARY, save_dense
from tests.helpers.pipeline import QUICK_BENCHMARK
from ziplm_deploy.pipeline import run_pipeline as run
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.reporting.records import FamilyReport
from ziplm_deploy.tasks import get_task

pytestmark = [pytest.mark.transformers, pytest.mark.slow]

WORDS = VOCABULARY[5:]

CASES = [
    ("bert", "fill-mask", "dynamic"),
    ("roberta", "text-classification", "dynamic"),
    ("xlm-roberta", "token-classification", "dynamic"),
    ("distilbert", "question-answering", "dynamic"),
    ("electra", "text-classification", "static"),
    ("distilbert", "text-regression", "dynamic"),
    ("mpnet", "sentence-similarity", "dynamic"),
    ("mpnet", "sentence-similarity", "static"),
    ("deberta-v2", "text-regression", "static"),
    ("t5", "sentence-similarity", "dynamic"),
    ("modernbert", "text-classification", "dynamic"),
    ("vit", "image-classification", "dynamic"),
    ("dinov2", "image-classification", "dynamic"),
]


def sentence(rng: np.random.Generator) -> list[str]:
    return [str(word) for word in rng.choice(WORDS, size=rng.integers(4, 12))]


def row(task: str, rng: np.random.Generator, folder: Path, number: int) -> dict[str, Any]:
    words = sentence(rng)
    if task == "sentence-similarity":
        return {"sentence1": " ".join(words), "sentence2": " ".join(sentence(rng)), "label": float(rng.uniform(0, 5))}
    if task == "text-classification":
        return {"text": " ".join(words), "label": int(rng.integers(3))}
    if task == "text-regression":
        return {"sentence1": " ".join(words), "sentence2": " ".join(sentence(rng)), "score": float(rng.uniform(0, 5))}
    if task == "token-classification":
        return {"tokens": words, "ner_tags": [int(tag) for tag in rng.integers(0, 3, len(words))]}
    if task == "question-answering":
        answers = {"text": [words[1]], "answer_start": [len(words[0]) + 1]}
        return {"id": str(number), "question": "who ran ?", "context": " ".join(words), "answers": answers}
    if task == "image-classification":
        from PIL import Image

        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
        return {"image": str(path), "label": int(rng.integers(3))}
    return {"text": " ".join(words)}


def write_rows(path: Path, task: str, n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    folder = path.parent / path.stem
    folder.mkdir()
    rows = [row(task, rng, folder, number) for number in range(n)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("model_type", "task", "shapes"), CASES)
def test_a_family_is_made_and_stock_optimum_serves_it(model_type: str, task: str, shapes: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hidden_size": 128}
    if task == "token-classification":
        changes["id2label"] = {0: "O", 1: "B-PER", 2: "I-PER"}
        changes["label2id"] = {"O": 0, "B-PER": 1, "I-PER": 2}
    save_dense(tmp_path / "model", model_type, task, **changes)
    report = run(
        parse_recipe(
            {
                "name": "case",
                "output_dir": str(tmp_path / "runs"),
                "model": {"path": str(tmp_path / "model"), "task": task},
                "data": {
                    "calibration": write_rows(tmp_path / "train.jsonl", task, 60, 0),
                    "evaluation": write_rows(tmp_path / "test.jsonl", task, 20, 1),
                    "n_calibration": 48,
                },
                "environment": {"workload": {"seq_len": 32}},
                "speedups": [2],
                "profile": {"stack_depth": 2, "width_ratio": 0.5, "min_rounds": 3, "max_rounds": 4, "max_seconds": 5},
                "prune": {"search": {"n_sequences": 16, "n_rerank": 16, "swap_evaluations": 6}},
                "export": {"shapes": shapes},
                "benchmark": dict(QUICK_BENCHMARK),
            }
        )
    )
    member = report.members[1]
    scores = member.served.accuracy
    assert scores
    assert all(np.isfinite(value) for value in scores.values())
    assert member.parameters < report.members[0].parameters
    folder = tmp_path / "runs" / "case" / "2x"
    assert FamilyReport.load(folder.parent / "report.json") == report
    if find_spec("optimum") is not None:  # in an environment of its own, for it takes no newer transformers
        assert_optimum_serves(folder, task, model_type)


def assert_optimum_serves(folder: Path, task: str, model_type: str) -> None:
    """Stock optimum loads the member's folder and answers."""
    ort = importlib.import_module("optimum.onnxruntime")
    served = getattr(ort, get_task(task).ort_class).from_pretrained(folder)
    if task == "image-classification":
        inputs = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    else:
        ids = torch.randint(5, 19, (1, 32))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        if model_type in ("distilbert", "roberta", "xlm-roberta", "mpnet", "deberta-v2", "t5"):
            del inputs["token_type_ids"]
    assert served(**inputs)
