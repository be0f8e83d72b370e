"""A whole run of a causal embedding model: last-token pooling, padding on the left, no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.helpers.models import WORDS
from tests.helpers.pipeline import raw_recipe
from tests.helpers.sentence_models import TinySentenceModel
from ziplm_deploy.compression.int8.quantize import quantized_linears
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_data
from ziplm_deploy.stages.profile import table_request

pytestmark = pytest.mark.transformers

TRAIN = {"mode": "distil", "max_steps": 1, "batch_size": 8}
MODEL = TinySentenceModel({"pooling_mode_lasttoken": True}, causal="qwen3", padding_side="left")


def recipe(folder: Path, **changes: Any) -> Recipe:
    return parse_recipe(raw_recipe(folder, **{"model": {"task": "sentence-similarity"}, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and pairs whose scores are what it says of them itself."""
    folder = tmp_path_factory.mktemp("causal encoder")
    MODEL.save(folder / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 20))) for _ in range(80)]
    left, right = MODEL.embeddings(folder / "model", texts[:40]), MODEL.embeddings(folder / "model", texts[40:])
    rows = [
        {"sentence1": a, "sentence2": b, "label": float(score)}
        for a, b, score in zip(texts[:40], texts[40:], (left * right).sum(1), strict=True)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.mark.slow
def test_a_model_scores_itself_right_and_its_members_have_its_head(folder: Path) -> None:
    compress = {"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}}
    recover = {"mode": "one-shot", "max_steps": 3, "batch_size": 8}
    report = run_pipeline(recipe(folder, compress=compress, recover=recover))
    dense, member = report.members
    assert dense.served.accuracy is not None
    assert dense.served.accuracy["spearman"] == pytest.approx(1.0, abs=1e-4)
    assert member.served.accuracy is not None
    path = folder / "runs" / "tiny" / "1.5x"
    assert json.loads((path / "1_Pooling" / "config.json").read_text())["pooling_mode_lasttoken"]
    assert type(load(path)).__name__ == "Qwen3Model"
    assert len(quantized_linears(path / "model_int8.onnx")) > 3
    for file in ("model.onnx", "model_int8.onnx"):
        graph = onnx.load(path / file).graph
        assert [item.name for item in graph.input] == ["input_ids", "attention_mask"]
        assert [item.name for item in graph.output] == ["last_hidden_state", "sentence_embedding"]
    inputs = {"input_ids": np.array([[2, 5, 7, 3]]), "attention_mask": np.ones((1, 4), dtype=np.int64)}
    assert onnx_runner(path / "model.onnx")(inputs)["sentence_embedding"].shape == (1, 32)


def test_a_table_is_of_the_form_of_the_files(folder: Path, tmp_path: Path) -> None:
    for form in ("onnxruntime", "portable"):
        run = Run(recipe(folder, output_dir=str(tmp_path / form), export={"cache_form": form}))
        assert f"{form} attention" in table_request(run).graph


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": ["sparse"]}, "compress.variants"),
        ({"variants": ["int8"], "int8": {"method": "qat"}, "train": TRAIN}, "compress.int8.method"),
        ({"variants": ["int8"], "int8": {"backend": "neural-compressor"}}, "compress.int8.backend"),
    ],
    ids=["sparse", "qat", "neural-compressor"],
)
def test_what_is_made_for_other_encoders_only_is_refused(
    changes: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    run = Run(recipe(folder, compress=changes, output_dir=str(tmp_path)))
    with pytest.raises(RecipeError, match=rf"{said} .* for the causal encoder qwen3"):
        check_data(run)
