"""Members in the loaders that people serve with: files and fields that they read, and the same answers as ours."""

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
from tests.helpers.sentence_models import TEXTS, TinySentenceModel
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.models.member_files import save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import DataConfig, ModelConfig, parse_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

PAIRS = [["who sat ?", "the cat sat on a mat"], ["who ran ?", "a dog ran"], ["who ran ?", "a tree"]]
MODELS = {
    "mean": TinySentenceModel({"pooling_mode_mean_tokens": True}, texts={"max_seq_length": 9}),
    "cls": TinySentenceModel({"pooling_mode_cls_token": True}, normalize=False, texts={"do_lower_case": True}),
    "pieces": TinySentenceModel({"pooling_mode_mean_tokens": True}, model_type="xlm-roberta", pieces=True),
}


def save_exported(folder: Path, settings: ModelConfig) -> torch.nn.Module:
    """A pruned member with its ONNX file; returns the model."""
    dense, processor = load_dense(settings)
    model = resize(dense, random_entries(dense, {"0.attention": 2, "1.ffn": 24, "2.attention": 0}))
    save_member(folder, model, processor, settings, {})
    complete = with_own_settings(settings)
    raw: dict[str, Any] = {"name": "a", "model": complete.model_dump(), "speedups": [2]}
    recipe = parse_recipe({**raw, "environment": {"workload": {"seq_len": 32}}}, source="test")
    OnnxExport.from_recipe(recipe, get_task(complete)).write(model, folder / "model.onnx", "member")
    return model


def embedder(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), task="sentence-similarity")


def embeddings(settings: ModelConfig, model: torch.nn.Module) -> np.ndarray:
    """As a run makes them of a member's torch model."""
    task: Any = get_task(with_own_settings(settings))
    rows = task.normalize_rows([{"text": text} for text in TEXTS], DataConfig(), "calibration")
    return np.asarray(task.embed(torch_function(task, model), EvaluationSet(rows, load_dense(settings)[1], 40, 4)))


def in_process(code: str, scratch: Path, *arguments: object) -> np.ndarray:
    """What ``code`` leaves as ``found``, in a process of its own; it has the ``arguments`` as texts."""
    begin = "import json, sys, numpy\nout, *arguments = sys.argv[1:]\n"
    command = [sys.executable, "-W", "ignore", "-c", f"{begin}{code}\nnumpy.save(out, found)", scratch / "found.npy"]
    subprocess.run([*map(str, command), *map(str, arguments)], check=True)
    found: np.ndarray = np.load(scratch / "found.npy")
    return found


# FastEmbed: output 0 of the file, pooled and normalized by its own code


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fastembed_embeds_as_members_do(name: str, tmp_path: Path) -> None:
    pytest.importorskip("fastembed", reason="fastembed is not installed")
    model = MODELS[name]
    settings = embedder(model.save(tmp_path / "dense"))
    member = save_exported(tmp_path / "member", settings)
    pooling, normalize = with_own_settings(settings).head
    code = (
        "from fastembed import TextEmbedding as T\n"
        "from fastembed.common.model_description import ModelSource, PoolingType\n"
        "folder, texts, pooling, normalize = arguments\n"
        "T.add_custom_model(model='member', pooling=PoolingType[pooling.upper()], normalization=normalize == 'True', "
        "sources=ModelSource(hf='a/member'), dim=32, model_file='model.onnx')\n"
        "found = numpy.array(list(T('member', specific_model_path=folder).embed(json.loads(texts))))"
    )
    found = in_process(code, tmp_path, tmp_path / "member", json.dumps(TEXTS), pooling, normalize)
    np.testing.assert_allclose(found, embeddings(settings, member), atol=1e-4)


@pytest.mark.slow
def test_fastembed_ranks_as_members_do(tmp_path: Path) -> None:
    pytest.importorskip("fastembed", reason="fastembed is not installed")
    save_dense(tmp_path / "dense", "bert", "text-regression")
    model: Any = save_exported(tmp_path / "member", ModelConfig(path=str(tmp_path / "dense"), task="reranking"))
    code = (
        "from fastembed.common.model_description import ModelSource\n"
        "from fastembed.rerank.cross_encoder import TextCrossEncoder as T\n"
        "T.add_custom_model(model='member', sources=ModelSource(hf='a/member'), model_file='model.onnx')\n"
        "model = T('member', specific_model_path=arguments[0])\n"
        "found = numpy.array(list(model.rerank_pairs([tuple(pair) for pair in json.loads(arguments[1])])))"
    )
    found = in_process(code, tmp_path, tmp_path / "member", json.dumps(PAIRS))
    processor = transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        expected = [model(**processor(*pair, return_tensors="pt")).logits.item() for pair in PAIRS]
    np.testing.assert_allclose(found, expected, atol=1e-4)


# What text-embeddings-inference reads of a folder, by its source; no server runs here


def test_folders_have_what_text_embeddings_inference_reads(tmp_path: Path) -> None:
    save_exported(tmp_path / "texts", embedder(MODELS["mean"].save(tmp_path / "dense")))
    save_dense(tmp_path / "cross", "bert", "text-regression")
    save_exported(tmp_path / "pairs", ModelConfig(path=str(tmp_path / "cross"), task="reranking"))
    for folder in ("texts", "pairs"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        wanted = {"architectures", "model_type", "max_position_embeddings", "hidden_size", "num_hidden_layers"}
        assert wanted <= set(config)
        assert {"model.onnx", "tokenizer.json", "tokenizer_config.json"} <= {
            path.name for path in (tmp_path / folder).iterdir()
        }
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == len(config["label2id"]) == 1
    pooling = json.loads((tmp_path / "texts" / "1_Pooling" / "config.json").read_text())
    modes = {"cls_token": False, "mean_tokens": True, "max_tokens": False, "mean_sqrt_len_tokens": False}
    assert {f"pooling_mode_{mode}": used for mode, used in modes.items()}.items() <= pooling.items()
    lengths = json.loads((tmp_path / "texts" / "sentence_bert_config.json").read_text())
    assert lengths["max_seq_length"] == 9


def test_members_cut_where_the_model_ends_if_nothing_says_so(tmp_path: Path) -> None:
    """Loaders without torch know no positions: they refuse a tokenizer without a limit, or run a file beyond them."""
    save_dense(tmp_path / "dense", "roberta", "text-regression")
    fields = json.loads((tmp_path / "dense" / "tokenizer_config.json").read_text())
    fields.pop("model_max_length")
    (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps(fields))
    settings = ModelConfig(path=str(tmp_path / "dense"), task="reranking")
    assert load_dense(settings)[1].model_max_length > 1e9
    save_exported(tmp_path / "member", settings)
    assert json.loads((tmp_path / "member" / "tokenizer_config.json").read_text())["model_max_length"] == 38
