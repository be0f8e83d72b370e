"""Folders of CrossEncoder, of every age: read as they say, kept in members, and opened by CrossEncoder again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.helpers.models import random_entries, save_dense
from tests.helpers.sentence_models import module, write
from ziplm_deploy.errors import CorruptArtifactError, DataError, UnsupportedModelError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import ModelConfig, parse_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task

pytestmark = pytest.mark.transformers

IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
PAIRS = [["who sat ?", "the cat sat on a mat"], ["who ran ?", "a dog ran"], ["who ran ?", "a tree"]]
TEXTS = {
    "transformer_task": "sequence-classification",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "scores",
}


def settings(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), task="reranking")


def save_folder(folder: Path, age: str, activation: Any = IDENTITY, **texts: Any) -> Path:
    """A cross-encoder as releases of an age write it: before 4.0, before 5.4, or since."""
    save_dense(folder, "bert", "text-regression")
    if age == "new":
        write(folder / "modules.json", [module(0, "", "Transformer", "new")])
        write(folder / "sentence_bert_config.json", {**TEXTS, **texts})
        write(folder / "config_sentence_transformers.json", {"activation_fn": activation, "prompts": {}})
        return folder
    config = json.loads((folder / "config.json").read_text())
    if age == "old":
        config["sbert_ce_default_activation_function"] = activation
    else:
        config["sentence_transformers"] = {"activation_fn": activation, "version": "4.1.0"}
    write(folder / "config.json", config)
    return folder


def save_exported(folder: Path, dense_folder: Path) -> torch.nn.Module:
    """A pruned member with its ONNX file; returns the model."""
    model, processor = load_dense(settings(dense_folder))
    model = resize(model, random_entries(model, {"0.attention": 2, "1.ffn": 24, "2.attention": 0}))
    save_member(folder, model, processor, settings(dense_folder), {})
    raw = {"name": "a", "model": {"path": str(dense_folder), "task": "reranking"}, "speedups": [2]}
    recipe = parse_recipe({**raw, "environment": {"workload": {"seq_len": 32}}}, source="test")
    OnnxExport.from_recipe(recipe, get_task("reranking")).write(model, folder / "model.onnx", "member")
    return model


@pytest.mark.parametrize("age", ["old", "middle", "new"])
def test_members_keep_the_activation_where_every_release_reads_it(age: str, tmp_path: Path) -> None:
    save_folder(tmp_path / "dense", age)
    model, processor = load_dense(settings(tmp_path / "dense"))
    save_member(tmp_path / "member", model, processor, settings(tmp_path / "dense"), {})
    config = json.loads((tmp_path / "member" / "config.json").read_text())
    assert config["sentence_transformers"]["activation_fn"] == IDENTITY
    inputs = processor(*map(list, zip(*PAIRS, strict=True)), return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "member")(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("age", ["old", "middle", "new"])
def test_regression_scores_and_learns_through_the_activation(age: str, tmp_path: Path) -> None:
    """As predict() of CrossEncoder gives scores, and its trainer learns: the file holds the output before it."""
    found = {}
    for activation in (IDENTITY, SIGMOID):
        folder = save_folder(tmp_path / activation, age, activation)
        asked = with_own_settings(ModelConfig(path=str(folder), task="text-regression"))
        found[activation] = get_task(asked)
        assert load_dense(asked)[0].config.sentence_transformers["activation_fn"] == activation
    rows = [{"text": a, "text_pair": b, "label": label} for (a, b), label in zip(PAIRS, (0.9, 0.1, 0.5), strict=True)]
    _, processor = load_dense(asked)
    data = EvaluationSet(rows, processor, 32)
    outputs = np.array([-3.0, 0.5, 4.0])
    plain, sigmoid = (
        found[name].outcomes(lambda inputs: {"logits": outputs[: len(inputs["input_ids"]), None]}, data)
        for name in (IDENTITY, SIGMOID)
    )
    np.testing.assert_allclose(np.sort(plain["predicted"]), outputs)
    np.testing.assert_allclose(np.sort(sigmoid["predicted"]), 1 / (1 + np.exp(-outputs)))
    batch = {"labels": torch.tensor([0.9, 0.1])}
    logits = {"logits": torch.tensor([[2.0], [-1.0]])}
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits["logits"][:, 0], batch["labels"])
    torch.testing.assert_close(found[SIGMOID].task_loss(logits, batch), expected)
    torch.testing.assert_close(
        found[IDENTITY].task_loss(logits, batch), ((logits["logits"][:, 0] - batch["labels"]) ** 2).mean()
    )
    with pytest.raises(DataError, match=r"labels of 0 to 1 for a model with Sigmoid over its score, found 4\.2; scale"):
        found[SIGMOID].examples([{**rows[0], "label": 4.2}], processor, 32)
    with pytest.raises(DataError, match=r"found 4\.2"):
        found[SIGMOID].head_settings([rows[0], {**rows[0], "label": 4.2}])
    assert found[IDENTITY].examples([{**rows[0], "label": 4.2}], processor, 32)


def test_a_recipe_may_name_the_activation(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "bert", "text-regression")
    for asked, kept in (("Sigmoid", SIGMOID), ("Identity", IDENTITY)):
        model, _ = load_dense(
            ModelConfig(path=str(tmp_path / "dense"), task="text-regression", score_activation=asked)  # type: ignore[arg-type]
        )
        assert model.config.sentence_transformers["activation_fn"] == kept
    other = save_folder(tmp_path / "other", "middle", "torch.nn.modules.activation.ReLU")
    with pytest.raises(UnsupportedModelError, match=r"ReLU.*name one in model\.score_activation"):
        load_dense(ModelConfig(path=str(other), task="text-regression"))
    load_dense(ModelConfig(path=str(other), task="text-regression", score_activation="Identity"))
    with pytest.raises(ValueError, match="expected task text-regression for score_activation, found reranking"):
        ModelConfig(path="a", task="reranking", score_activation="Sigmoid")
    with pytest.raises(ValueError, match="score_activation"):
        ModelConfig(path="a", task="text-regression", score_activation="Softmax")  # type: ignore[arg-type]


def test_a_plain_model_says_nothing(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "bert", "text-regression")
    model, processor = load_dense(settings(tmp_path / "dense"))
    save_member(tmp_path / "member", model, processor, settings(tmp_path / "dense"), {})
    assert "sentence_transformers" not in json.loads((tmp_path / "member" / "config.json").read_text())


def test_texts_are_cut_as_the_folder_says(tmp_path: Path) -> None:
    _, processor = load_dense(settings(save_folder(tmp_path, "new", max_seq_length=7)))
    assert processor.model_max_length == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("activation", [IDENTITY, SIGMOID])
def test_cross_encoder_opens_a_member(activation: str, tmp_path: Path) -> None:
    """In a process of its own: its import changes settings of other packages."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    pytest.importorskip("optimum.onnxruntime", reason="optimum is not installed")
    model = save_exported(tmp_path / "member", save_folder(tmp_path / "dense", "new", activation))
    code = (
        "import json, sys, numpy; from sentence_transformers import CrossEncoder as C\n"
        "model = C(sys.argv[1], backend='onnx', device='cpu', model_kwargs={'file_name': 'model.onnx'})\n"
        "numpy.save(sys.argv[2], model.predict(json.loads(sys.argv[3])))"
    )
    arguments = [tmp_path / "member", tmp_path / "found.npy", json.dumps(PAIRS)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], check=True)
    expected = scores_of(model, tmp_path / "dense")
    expected = expected if activation == IDENTITY else 1 / (1 + np.exp(-expected))
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-4)


def scores_of(model: Any, tokenizer: Path) -> np.ndarray:
    """Logits of the pairs, one at a time."""
    processor = transformers.AutoTokenizer.from_pretrained(tokenizer)
    with torch.no_grad():
        return np.array([model(**processor(*pair, return_tensors="pt")).logits.item() for pair in PAIRS])


@pytest.mark.slow
def test_cross_encoder_takes_a_member_from_our_loader(tmp_path: Path) -> None:
    """The dense folder opened by CrossEncoder, its model replaced by the member's."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = save_exported(tmp_path / "member", save_folder(tmp_path / "dense", "middle"))
    code = (
        "import json, sys, numpy, ziplm_deploy; from sentence_transformers import CrossEncoder as C\n"
        "model = C(sys.argv[1], device='cpu')\n"
        "model[0].model = ziplm_deploy.load(sys.argv[2])\n"
        "numpy.save(sys.argv[3], model.predict(json.loads(sys.argv[4])))"
    )
    arguments = [tmp_path / "dense", tmp_path / "member", tmp_path / "found.npy", json.dumps(PAIRS)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), scores_of(model, tmp_path / "dense"), atol=1e-5)


# refused


@pytest.mark.parametrize("age", ["old", "middle", "new"])
@pytest.mark.parametrize(
    ("activation", "error"),
    [
        ("my_package.Activation", UnsupportedModelError),
        ("torch.nn.modules.activation.Softmax", UnsupportedModelError),
        (7, CorruptArtifactError),
    ],
)
def test_other_activations_are_refused(age: str, activation: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match=str(activation)):
        load_dense(settings(save_folder(tmp_path, age, activation)))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("modules.json", [module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")], "found Transformer, Pool"),
        ("modules.json", {}, "list of modules"),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "transformer_task"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"rank": "who ? "}, "default_prompt_name": "rank"},
            "without a default prompt .*'who [?] '",
        ),
    ],
)
def test_folders_of_other_models_are_refused(name: str, content: Any, match: str, tmp_path: Path) -> None:
    save_folder(tmp_path, "new")
    write(tmp_path / name, content)
    with pytest.raises((UnsupportedModelError, CorruptArtifactError), match=match):
        load_dense(settings(tmp_path))


def test_a_classifier_is_no_reranker(tmp_path: Path) -> None:
    save_dense(tmp_path, "bert", "text-classification")
    model, _ = load_dense(settings(tmp_path))
    with pytest.raises(DataError, match="one output for reranking, found one with 3"):
        get_task("reranking").check_labels([], model.config)
