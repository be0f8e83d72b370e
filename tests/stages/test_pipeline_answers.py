"""A family whose right scores are known: labels are the dense model's own answers, so that it must be right in all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers

from tests.helpers.models import save_dense, sentences
from tests.helpers.pipeline import recipe
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline

NAMES = ["contradiction", "neutral", "entailment"]  # in another order than the alphabet's
TEXTS = list(dict.fromkeys(sentences(60, 5)))


def answers(model: Any, folder: Path) -> list[str]:
    """Names of the classes that a model finds, one text at a time and without anything of this package."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    return [NAMES[int(each.argmax())] for each in logits]


def answers_of_file(path: Path, folder: Path) -> list[str]:
    """The same of an ONNX file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    encoded = [tokenizer(text, return_tensors="np") for text in TEXTS]
    logits = [session.run(["logits"], {name: each[name] for name in wanted})[0][0] for each in encoded]
    return [NAMES[int(each.argmax())] for each in logits]


def share_of(right: list[str], given: list[str]) -> float:
    return sum(one == other for one, other in zip(given, right, strict=True)) / len(right)


@pytest.mark.slow
def test_scores_are_those_of_the_members_own_answers(tmp_path: Path) -> None:
    classes = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
    dense = save_dense(
        tmp_path / "model", task="text-classification", hidden_size=128, intermediate_size=512, **classes
    )
    right = answers(dense, tmp_path / "model")
    assert len(set(right)) > 1, "a model with one answer for all texts would show nothing"
    rows = [{"text": text, "label": name} for text, name in zip(TEXTS, right, strict=True)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(64)))
    # Zeros that change answers, whichever plan the timings of this machine lead to.
    compress = {
        "variants": ["sparse", "int8"],
        "int8": {"method": "static", "n_calibration": 8},
        "sparsity": {"sparsity": 0.97},
    }
    changes = {"model": {"path": str(tmp_path / "model")}, "compress": compress}
    report = run_pipeline(recipe(tmp_path, speedups=[2.0], **changes))
    first, member = report.members
    assert first.served.accuracy["accuracy"] == 1.0
    assert first.served.accuracy["macro_f1"] == 1.0
    folder = tmp_path / "runs" / "tiny" / member.folder
    plain, *compressed = member.files
    shared = share_of(right, answers(load(folder), folder))
    assert plain.accuracy["accuracy"] == pytest.approx(shared)
    assert shared < 1, "a member that answers like the dense model would hide that the two were swapped"
    assert {file.variant for file in compressed} == {"sparse", "int8"}
    scores = [file.accuracy["accuracy"] for file in compressed]
    assert scores == pytest.approx(
        [share_of(right, answers_of_file(folder / file.file, folder)) for file in compressed]
    )
    assert len({shared, *scores}) > 1, "files that all answer alike would hide that they were swapped"
