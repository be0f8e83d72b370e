"""A whole run of a sentence-transformers model that has everything such models have: its embeddings are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file

from exporters.heads import sentence_dense
from tests.helpers.models import WORDS, save_dense
from tests.helpers.pipeline import raw_recipe
from tests.helpers.sentence_models import TinySentenceModel, write
from ziplm_deploy.errors import RecipeError, UsageError
from ziplm_deploy.models.member_files import load
from ziplm_deploy.pipeline import run_pipeline
from ziplm_deploy.recipe import Recipe, parse_recipe
from ziplm_deploy.run.run import Run
from ziplm_deploy.stages.checks import check_training
from ziplm_deploy.stages.profile import table_request

MODEL = TinySentenceModel(
    {"pooling_mode": "max"},
    dense=((24, True, "ReLU"), (8, False, None)),
    normalize=False,
    texts={"max_seq_length": 14, "do_lower_case": True},
    settings={
        "prompts": {"query": "who ran ? "},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    },
    age="new",
    lowers=False,
)


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A run over pairs whose scores are what the model itself says of them."""
    changes = {"model": {}, **changes}
    changes["model"] = {"task": "sentence-similarity", **changes["model"]}
    return parse_recipe(raw_recipe(folder, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    MODEL.save(folder / "model")
    rng = np.random.default_rng(0)
    words = [word for name in WORDS for word in (name, name.upper())]
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 20))) for _ in range(80)]
    left, right = MODEL.embeddings(folder / "model", texts[:40]), MODEL.embeddings(folder / "model", texts[40:])
    rows = [
        {"sentence1": a, "sentence2": b, "label": float(score)}
        for a, b, score in zip(texts[:40], texts[40:], (left * right).sum(1), strict=True)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.mark.slow
def test_a_model_scores_itself_right_and_its_members_keep_what_it_has(folder: Path) -> None:
    compress = {"variants": ["int8"], "int8": {"method": "static", "n_calibration": 8}}
    recover = {"mode": "one-shot", "max_steps": 3, "batch_size": 8}
    report = run_pipeline(recipe(folder, compress=compress, recover=recover))
    dense, member = report.members
    assert dense.served.accuracy is not None
    assert dense.served.accuracy["spearman"] == pytest.approx(1.0, abs=1e-4)
    assert member.served.accuracy is not None
    run_folder = folder / "runs" / "tiny"
    resolved = yaml.safe_load((run_folder / "recipe.yaml").read_text())["model"]
    assert (resolved["pooling"], resolved["normalize"], resolved["similarity"]) == ("max", False, "dot")
    assert resolved["prompt"] == "who ran ? "
    trained = load(run_folder / "1.5x")
    layers = sentence_dense(trained)
    assert layers is not None
    assert torch.equal(
        load_file(run_folder / "1.5x" / "3_Dense" / "model.safetensors")["linear.weight"], layers[2].weight
    )
    source = load_file(folder / "model" / "3_Dense" / "model.safetensors")["linear.weight"]
    assert not torch.equal(source, layers[2].weight)  # trained with the rest
    for file in ("model.onnx", "model_int8.onnx"):
        shapes = {o.name: o.shape for o in onnxruntime.InferenceSession(run_folder / "1.5x" / file).get_outputs()}
        assert shapes["sentence_embedding"][-1] == 8
    assert json.loads((run_folder / "1.5x" / "sentence_bert_config.json").read_text()) == MODEL.texts


def test_a_run_against_the_model_ends_before_it_begins(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"output_dir": str(tmp_path)}
    with pytest.raises(RecipeError, match=r'expected model\.pooling: "max"'):
        Run(recipe(folder, model={"pooling": "mean"}, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_makes_other_embeddings_is_refused(folder: Path, tmp_path: Path) -> None:
    other = TinySentenceModel(MODEL.pooling, normalize=False, texts=MODEL.texts, settings=MODEL.settings, lowers=False)
    cases = [
        (TinySentenceModel({"pooling_mode": "mean"}), "makes embeddings as .* does: expected model.pooling"),
        (other, "embedding size 8"),
    ]
    for number, (teacher, match) in enumerate(cases):
        path = teacher.save(tmp_path / str(number))
        recover = {"mode": "one-shot", "max_steps": 1, "batch_size": 8, "teacher": str(path)}
        with pytest.raises(UsageError, match=match):
            check_training(Run(recipe(folder, recover=recover, output_dir=str(tmp_path / "runs"))))
    write(tmp_path / "1" / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})
    with pytest.raises(UsageError, match="prompt 'who ran"):
        check_training(Run(recipe(folder, recover=recover, output_dir=str(tmp_path / "runs"))))


def test_keys_of_plain_models_are_those_of_before(tmp_path: Path) -> None:
    save_dense(tmp_path / "model")
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    run = Run(recipe(tmp_path))
    assert run.model_settings == {"task": "sentence-similarity", "pooling": "mean", "normalize": True}
    said = Run(recipe(tmp_path, model={"pooling": "mean", "normalize": True}, output_dir=str(tmp_path / "other")))
    assert said.model_settings == run.model_settings


def test_keys_hold_what_a_model_says(folder: Path, tmp_path: Path) -> None:
    run = Run(recipe(folder, output_dir=str(tmp_path)))
    assert "Dense layers of 24 8" in table_request(run).graph
    found = dict(run.model_settings)
    layers = found.pop("dense_layers")
    assert [layer["out_features"] for layer in layers] == [24, 8]
    assert found == {
        **{"task": "sentence-similarity", "pooling": "max", "normalize": False, "similarity": "dot"},
        **{"prompt": "who ran ? ", "max_seq_length": 14, "do_lower_case": True},
    }
