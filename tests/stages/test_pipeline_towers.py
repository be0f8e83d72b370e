"""A whole run of CLIP's text tower, out of a checkpoint of both towers: its members have the projection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from exporters.heads import sentence_dense
from tests.helpers.models import sentences
from tests.helpers.pipeline import raw_recipe
from tests.helpers.towers import PROJECTION, save_whole
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import parse_recipe

pytestmark = pytest.mark.transformers


@pytest.mark.slow
def test_a_text_tower_scores_itself_right(tmp_path: Path) -> None:
    clip = save_whole(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = list(dict.fromkeys(sentences(80)))
    texts = texts[: len(texts) // 2 * 2]
    with torch.no_grad():
        found = [clip.get_text_features(tokenizer(text, return_tensors="pt")["input_ids"]) for text in texts]
    vectors = normalize(torch.cat([getattr(each, "pooler_output", each) for each in found]))  # of transformers 5
    half = len(texts) // 2
    scores = (vectors[:half] * vectors[half:]).sum(1).tolist()
    rows = [{"sentence1": a, "sentence2": b, "label": c} for a, b, c in zip(texts, texts[half:], scores, strict=False)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changes = {
        "model": {"task": "sentence-similarity"},
        "compress": {"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}},
        "recover": {"mode": "one-shot", "max_steps": 3, "batch_size": 8},
    }
    report = run_pipeline(parse_recipe(raw_recipe(tmp_path, **changes)))
    dense, member = report.members
    assert dense.served.accuracy is not None
    assert dense.served.accuracy["spearman"] == pytest.approx(1.0, abs=1e-4)
    assert member.served.accuracy is not None
    folder = tmp_path / "runs" / "tiny" / "1.5x"
    trained = load(folder)
    assert type(trained).__name__ == "CLIPTextModel"
    assert sentence_dense(trained) is not None
    inputs = {"input_ids": np.array([[2, 5, 7, 3]]), "attention_mask": np.ones((1, 4), dtype=np.int64)}
    for file in ("model.onnx", "model_int8.onnx"):
        assert onnx_runner(folder / file)(inputs)["sentence_embedding"].shape == (1, PROJECTION)
