"""torch ≡ ONNX at 1e-4 for every architecture, task and shape mode; stock optimum gives the same answers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from exporters import (
    EmbeddingModel,
    ExportError,
    ExportSettings,
    ParityMismatch,
    check_parity,
    dummy_inputs,
    export_encoder,
    input_names,
)
from exporters.heads import pool
from tests.helpers.models import (
    BLOCK_TYPES,
    IMAGE_TYPES,
    MODEL_TYPES,
    TEXT_TASKS,
    output_tensors,
    random_entries,
    save_dense,
    tiny_inputs,
    tiny_model,
)
from tests.helpers.onnx_models import kernels_of
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.member_files import save_member
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers

SETTINGS = ExportSettings(seq_len=32)
SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 3}
OUTPUTS = {
    "sentence-similarity": ["last_hidden_state"],
    "text-classification": ["logits"],
    "text-regression": ["logits"],
    "question-answering": ["start_logits", "end_logits"],
    "token-classification": ["logits"],
    "fill-mask": ["logits"],
    "image-classification": ["logits"],
}
ORT_CLASSES = {
    "sentence-similarity": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "text-regression": "ORTModelForSequenceClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "token-classification": "ORTModelForTokenClassification",
    "fill-mask": "ORTModelForMaskedLM",
    "image-classification": "ORTModelForImageClassification",
}


def resized_model(model_type: str, task: str | None = None) -> nn.Module:
    dense = tiny_model(model_type, task)
    return resize(dense, random_entries(dense, SIZES))


def default_outputs(model_type: str) -> list[str]:
    return ["logits"] if model_type in IMAGE_TYPES else ["last_hidden_state"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_dynamic_export_answers_for_any_shape(model_type: str, tmp_path: Path) -> None:
    model = resized_model(model_type)
    settings = SETTINGS
    path = tmp_path / "model.onnx"
    export_encoder(model, dummy_inputs(model, settings), default_outputs(model_type), path, settings)
    for batch_size, seq_len in ((1, 5), (3, 30)):
        inputs = tiny_inputs(model, batch_size, seq_len)
        segments = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if model_type not in IMAGE_TYPES else {}
        inputs |= {name: value for name, value in segments.items() if name in input_names(model)}
        assert check_parity(model, path, inputs, atol=1e-4) < 1e-4
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_static_export_fixes_the_shapes(model_type: str, tmp_path: Path) -> None:
    model = resized_model(model_type)
    settings = ExportSettings(shapes="static", batch_size=2, seq_len=11)
    inputs = dummy_inputs(model, settings)
    path = tmp_path / "model.onnx"
    export_encoder(model, inputs, default_outputs(model_type), path, settings)
    assert check_parity(model, path, inputs, atol=1e-4) < 1e-4
    for item in onnxruntime.InferenceSession(path).get_inputs():
        assert item.shape == list(inputs[item.name].shape)


@pytest.mark.parametrize("opset", [16, 17])
@pytest.mark.parametrize("model_type", [name for name in BLOCK_TYPES if name != "eurobert"])  # which has RMSNorms
def test_onnx_runtime_does_not_merge_residuals_into_its_slow_kernel(
    model_type: str, opset: int, tmp_path: Path
) -> None:
    model = resized_model(model_type)
    settings = ExportSettings(shapes="static", opset=opset, batch_size=2, seq_len=11)
    path = tmp_path / "model.onnx"
    export_encoder(model, dummy_inputs(model, settings), default_outputs(model_type), path, settings)
    found = kernels_of(path)
    assert found["SkipLayerNormalization"] == 0
    assert found["LayerNormalization"] > found["Sum"] > 0
    exported = onnx.load(path)
    for node in exported.graph.node:  # as torch writes it: the kernel that this test is about would be there
        node.op_type = "Add" if node.op_type == "Sum" else node.op_type
    onnx.save(exported, tmp_path / "plain.onnx")
    assert kernels_of(tmp_path / "plain.onnx")["SkipLayerNormalization"] > 0


@pytest.mark.parametrize("opset", [14, 17, 20])
def test_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    model = resized_model("bert")
    settings = ExportSettings(seq_len=32, opset=opset)
    path = tmp_path / "model.onnx"
    export_encoder(model, dummy_inputs(model, settings), ["last_hidden_state"], path, settings)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [opset]
    assert ("LayerNormalization" in {node.op_type for node in graph.graph.node}) == (opset >= 17)


def test_a_dropped_module_leaves_no_matrix_product(tmp_path: Path) -> None:
    products = {}
    for size in (0, 2):
        dense = tiny_model("bert")
        model = resize(dense, random_entries(dense, {f"{layer}.attention": size for layer in range(3)}))
        path = tmp_path / f"{size}.onnx"
        export_encoder(model, dummy_inputs(model, SETTINGS), ["last_hidden_state"], path, SETTINGS)
        products[size] = sum(node.op_type == "MatMul" for node in onnx.load(path).graph.node)
    assert products == {0: 3 * 2, 2: 3 * 8}


def test_input_names() -> None:
    assert input_names(tiny_model("bert")) == ["input_ids", "attention_mask", "token_type_ids"]
    assert input_names(EmbeddingModel(tiny_model("electra"), "mean", True))[-1] == "token_type_ids"
    for model_type in ("roberta", "xlm-roberta", "distilbert", "mpnet"):
        assert input_names(tiny_model(model_type)) == ["input_ids", "attention_mask"]
    assert input_names(tiny_model("vit")) == ["pixel_values"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embedding_in_the_graph(pooling: str, normalize: bool, tmp_path: Path) -> None:
    encoder = resized_model("bert")
    model = EmbeddingModel(encoder, pooling, normalize)  # type: ignore[arg-type]
    path = tmp_path / "model.onnx"
    names = ["last_hidden_state", "sentence_embedding"]
    export_encoder(model, dummy_inputs(model, SETTINGS), names, path, SETTINGS)
    inputs = tiny_inputs(model, 3, 7)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    assert check_parity(model, path, inputs, atol=1e-4) < 1e-4
    hidden = output_tensors(encoder, inputs)["last_hidden_state"].numpy()
    for row, vectors, mask in zip(
        output_tensors(model, inputs)["sentence_embedding"], hidden, inputs["attention_mask"].numpy(), strict=True
    ):
        real = vectors[mask == 1]
        pooled = {"mean": real.mean(axis=0), "cls": vectors[0], "max": real.max(axis=0), "lasttoken": real[-1]}
        expected = pooled[pooling]
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-5)


def test_pooling_of_an_empty_row_is_finite_and_unknown_pooling_refused() -> None:
    for pooling in ("mean", "cls", "max", "lasttoken"):
        pooled = pool(torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64), pooling, normalize=True)  # type: ignore[arg-type]
        assert torch.isfinite(pooled).all()
    with pytest.raises(ValueError, match="'weightedmean'"):
        EmbeddingModel(tiny_model("bert"), "weightedmean", True)  # type: ignore[arg-type]


def _member(folder: Path, model_type: str, task: str) -> tuple[nn.Module, Path]:
    save_dense(folder / "dense", model_type, task)
    config = ModelConfig(path=str(folder / "dense"), task=task)  # type: ignore[arg-type]
    dense, processor = load_dense(config)
    model = resize(dense, random_entries(dense, SIZES))
    save_member(folder / "member", model, processor, config, {})
    exported = EmbeddingModel(model, "mean", True) if task == "sentence-similarity" else model
    names = OUTPUTS[task] + (["sentence_embedding"] if task == "sentence-similarity" else [])
    settings = SETTINGS
    export_encoder(exported, dummy_inputs(model, settings), names, folder / "member" / "model.onnx", settings)
    return model, folder / "member"


CASES = [("bert", task) for task in TEXT_TASKS] + [
    ("distilbert", "text-classification"),
    ("roberta", "question-answering"),
    ("mpnet", "fill-mask"),
    ("deberta-v2", "text-classification"),
    ("electra", "token-classification"),
    ("xlm-roberta", "sentence-similarity"),
    ("vit", "image-classification"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_stock_optimum_gives_the_same_answers(model_type: str, task: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("optimum.onnxruntime")
    model, folder = _member(tmp_path, model_type, task)
    served = getattr(ort, ORT_CLASSES[task]).from_pretrained(folder)
    inputs = tiny_inputs(model, 2, 8)
    expected, found = output_tensors(model, inputs), served(**inputs)
    for name in OUTPUTS[task]:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
    assert served.config.num_labels == model.config.num_labels


def test_sentence_transformers_accepts_a_member(tmp_path: Path) -> None:
    """In a process of its own: its import turns on warnings and telemetry settings of other packages."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("optimum.onnxruntime")
    model, folder = _member(tmp_path, "bert", "sentence-similarity")
    code = (
        "import sys, numpy; from sentence_transformers import SentenceTransformer as S\n"
        "numpy.save(sys.argv[2], S(sys.argv[1], backend='onnx', device='cpu').encode(['the cat sat', 'a dog ran .']))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "found.npy")], check=True)
    # [CLS] the cat sat [SEP] [PAD] and [CLS] a dog ran . [SEP]
    ids = torch.tensor([[2, 5, 7, 9, 3, 0], [2, 6, 8, 10, 15, 3]])
    expected = output_tensors(EmbeddingModel(model, "mean", True), {"input_ids": ids, "attention_mask": (ids > 0) * 1})
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected["sentence_embedding"], atol=1e-4)


def test_parity_catches_other_weights_and_nan(tmp_path: Path) -> None:
    model = tiny_model("bert")
    path = tmp_path / "model.onnx"
    inputs = dummy_inputs(model, SETTINGS)
    export_encoder(model, inputs, ["last_hidden_state"], path, SETTINGS)
    with pytest.raises(ParityMismatch, match="last_hidden_state") as caught:
        check_parity(tiny_model("bert", seed=3), path, inputs, atol=1e-4)
    assert caught.value.difference > 1e-4
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(ParityMismatch, match="NaN"):
        check_parity(model, path, inputs, atol=1e-4)


def test_parity_on_several_inputs_loads_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model("bert"), tmp_path / "model.onnx"
    inputs = dummy_inputs(model, SETTINGS)
    export_encoder(model, inputs, ["last_hidden_state"], path, SETTINGS)
    longer = dummy_inputs(model, ExportSettings("static", seq_len=24))
    loaded: list[str] = []
    session = onnxruntime.InferenceSession

    def noting(source: str, *more: Any, **options: Any) -> Any:
        loaded.append(source)
        return session(source, *more, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noting)
    found = check_parity(model, path, (inputs, longer), atol=1e-4)
    assert loaded == [str(path)]
    assert found == max(check_parity(model, path, each, atol=1e-4) for each in (inputs, longer))
    with torch.no_grad():  # at a position that only the second one reaches
        model.embeddings.position_embeddings.weight[20] *= -1  # type: ignore[index, operator, union-attr]
    assert check_parity(model, path, inputs, atol=1e-4) < 1e-4
    with pytest.raises(ParityMismatch, match="last_hidden_state"):
        check_parity(model, path, (inputs, longer), atol=1e-4)


def test_bad_requests_leave_no_file(tmp_path: Path) -> None:
    model = tiny_model("bert")
    settings = SETTINGS
    inputs = dummy_inputs(model, settings)
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="logits"):
        export_encoder(model, inputs, ["logits"], path, settings)
    with pytest.raises(ExportError, match="none"):
        export_encoder(model, inputs, [], path, settings)
    with pytest.raises(ExportError, match="opset 3"):
        export_encoder(model, inputs, ["last_hidden_state"], path, ExportSettings(seq_len=32, opset=3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "positions"), [("bert", 40), ("roberta", 38), ("mpnet", 38), ("distilbert", 40)]
)
def test_longest_sequence(model_type: str, positions: int) -> None:
    model = tiny_model(model_type)
    inputs = dummy_inputs(model, ExportSettings(shapes="static", seq_len=positions))
    with torch.no_grad():
        model(**inputs)
    with pytest.raises(ExportError, match=f"seq_len <= {positions}"):
        dummy_inputs(model, ExportSettings(seq_len=positions + 1))


def test_more_than_two_gigabytes_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    inputs = dummy_inputs(model, SETTINGS)
    model.huge = nn.Linear(2**15, 2**15, device="meta")
    with pytest.raises(ExportError, match="one ONNX file holds no more"):
        export_encoder(model, inputs, ["last_hidden_state"], tmp_path / "model.onnx", SETTINGS)


def test_training_mode_is_restored(tmp_path: Path) -> None:
    model = tiny_model("bert").train()
    inputs = dummy_inputs(model, SETTINGS)
    export_encoder(model, inputs, ["last_hidden_state"], tmp_path / "model.onnx", SETTINGS)
    assert model.training
    assert check_parity(model, tmp_path / "model.onnx", inputs, atol=1e-4) < 1e-4
