"""Language models without their head as encoders: masked ≡ resized ≡ reloaded ≡ ONNX ≡ sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from exporters import EmbeddingHead, EmbeddingModel, ExportError, ExportSettings, check_parity, export_causal_encoder
from tests.helpers.decoder_models import skip_in_old_engine
from tests.helpers.int8_files import settings_of
from tests.helpers.models import (
    output_tensors,
    random_entries,
    save_dense,
    tiny_causal_model,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)
from tests.helpers.pipeline import save_causal
from tests.helpers.sentence_models import TEXTS, TinySentenceModel, by_sentence_transformers
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.quantize import linear_names, quantize, quantized_linears
from ziplm_deploy.errors import RecipeError, UnsupportedModelError
from ziplm_deploy.models.causal import is_language_model
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import MAX_POSITIONS, OnnxExport, longest_text, write_graph
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import masked, resize
from ziplm_deploy.recipe import DataConfig, Int8Config, ModelConfig, parse_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 1}
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
FORMS = ("onnxruntime", "portable")
OUTPUTS = ["last_hidden_state", "sentence_embedding"]
CONFIG = ModelConfig(path="", task="sentence-similarity", pooling="lasttoken")
QWEN3 = TinySentenceModel(
    {"pooling_mode_lasttoken": True},
    settings={"prompts": {"query": "who sat on the mat ? ", "document": ""}, "default_prompt_name": None},
    causal="qwen3",
    padding_side="left",
)
WITH_DENSE = TinySentenceModel(
    {"pooling_mode": "mean"}, dense=((24, True, "ReLU"), (8, False, None)), causal="llama", padding_side="left"
)


def encoder(model_type: str) -> nn.Module:
    """A tiny language model without its head, whose heads are as wide as the fused attention takes."""
    base = tiny_causal_model(model_type, **({} if model_type == "qwen3" else {"hidden_size": 64})).base_model
    assert isinstance(base, nn.Module)
    return base


def padded(model: nn.Module, side: str) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(model, 3, 9)
    return {
        **inputs,
        "attention_mask": inputs["attention_mask"].flip(1) if side == "left" else inputs["attention_mask"],
    }


def vectors(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output_tensors(model, inputs)["last_hidden_state"][inputs["attention_mask"].bool()]


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": "sentence-similarity", **changes})


@pytest.mark.parametrize("model_type", ROTARY)
def test_masked_equals_resized_equals_reloaded(model_type: str, tmp_path: Path) -> None:
    dense = encoder(model_type)
    entries, inputs = random_entries(dense, SIZES), padded(dense, "right")
    resized = resize(dense, entries)
    expected = vectors(masked(dense, entries), inputs)
    torch.testing.assert_close(vectors(resized, inputs), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, vectors(dense, inputs), atol=1e-3)
    save_member(tmp_path / "member", resized, tiny_tokenizer(tmp_path), CONFIG, {})
    again = load(tmp_path / "member")
    assert type(again) is type(dense)
    assert not is_language_model(again)
    torch.testing.assert_close(vectors(again, inputs), vectors(resized, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ROTARY)
def test_files_answer_like_torch_with_padding_on_either_side(model_type: str, form: Any, tmp_path: Path) -> None:
    if model_type == "mistral":
        skip_in_old_engine(form, (1, 24))  # windows
    dense = encoder(model_type)
    resized = resize(dense, random_entries(dense, SIZES))
    model = EmbeddingModel(resized, "lasttoken", True).eval()
    path = tmp_path / "model.onnx"
    write_graph(model, path, OUTPUTS, ExportSettings(seq_len=24), form)
    rows = [padded(resized, side) for side in ("right", "left")]
    assert check_parity(model, path, rows, atol=1e-4) < 1e-4
    session = onnxruntime.InferenceSession(path)
    right, left = ({name: value.numpy() for name, value in row.items()} for row in rows)
    hidden = session.run(["last_hidden_state"], left)[0]
    assert not hidden[left["attention_mask"] == 0].any()
    # One text, padded on either side: nothing but its place differs.
    ids, real = right["input_ids"][-1:], right["attention_mask"][-1:]
    turned = {"input_ids": np.roll(ids, 3), "attention_mask": np.roll(real, 3)}
    expected, found = (
        session.run(["sentence_embedding"], feed)[0] for feed in ({"input_ids": ids, "attention_mask": real}, turned)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_every_head_is_in_the_graph(pooling: Any, opset: int, tmp_path: Path) -> None:
    inner = encoder("qwen3")
    activations = [nn.Tanh(), nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Sigmoid()]
    torch.manual_seed(0)
    inner.sentence_dense = nn.Sequential(*(part for each in activations for part in (nn.Linear(32, 32), each)))
    for normalize in (True, False):
        model = EmbeddingModel(inner, pooling, normalize).eval()
        path = tmp_path / f"{normalize}.onnx"
        for form in FORMS:
            write_graph(model, path, OUTPUTS, ExportSettings(seq_len=24, opset=opset), form)  # type: ignore[arg-type]
            assert check_parity(model, path, padded(inner, "right"), atol=1e-4) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_static_files_have_fixed_shapes(form: Any, tmp_path: Path) -> None:
    model = EmbeddingModel(encoder("qwen3"), "lasttoken", False).eval()
    path = tmp_path / "model.onnx"
    inputs = write_graph(model, path, OUTPUTS, ExportSettings("static", 17, 2, 11), form)
    assert check_parity(model, path, inputs, atol=1e-4) < 1e-4
    session = onnxruntime.InferenceSession(path)
    assert [item.shape for item in session.get_inputs()] == [[2, 11], [2, 11]]
    assert [item.shape for item in session.get_outputs()] == [[2, 11, 32], [2, 32]]


@pytest.mark.parametrize("form", FORMS)
def test_linears_of_files_compute_in_integers(form: Any, tmp_path: Path) -> None:
    resized = resize(encoder("qwen3"), random_entries(encoder("qwen3"), SIZES))
    model = EmbeddingModel(resized, "lasttoken", True).eval()
    source, made = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    write_graph(model, source, OUTPUTS, ExportSettings(seq_len=24), form)
    quantize(source, made, settings_of(Int8Config(method="dynamic")))
    assert quantized_linears(made) == linear_names(source)
    modules = dict(resized.named_modules())
    groups = linear_groups(resized, linear_names(source))
    assert {path for paths in groups.values() for path in paths} == {
        name for name, module in modules.items() if isinstance(module, nn.Linear)
    }
    inputs = padded(resized, "left")
    feed = {name: value.numpy() for name, value in inputs.items()}
    (found,) = onnxruntime.InferenceSession(made).run(["sentence_embedding"], feed)
    assert (found * output_tensors(model, inputs)["sentence_embedding"].numpy()).sum(1).min() > 0.95


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    parts = causal_parts(encoder("qwen3"))
    path, sizes = tmp_path / "model.onnx", ExportSettings(seq_len=24)
    limits: dict[str, Any] = {"form": "portable", "max_length": 24}
    with pytest.raises(ExportError, match="found sentence_embedding"):
        export_causal_encoder(parts, None, ["sentence_embedding"], path, sizes, **limits)
    head = EmbeddingHead("mean", True, (nn.Softplus(),))
    with pytest.raises(ExportError, match="Softplus"):
        export_causal_encoder(parts, head, ["sentence_embedding"], path, sizes, **limits)
    learned = causal_parts(tiny_causal_model("gpt2"))
    with pytest.raises(ExportError, match="learned positions"):
        export_causal_encoder(learned, None, ["last_hidden_state"], path, sizes, **limits)
    assert not path.exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {"qwen3": QWEN3, "dense": WITH_DENSE}
    return {
        name: model.save(tmp_path_factory.mktemp("model"), **({} if name == "qwen3" else {"head_dim": 16}))
        for name, model in models.items()
    }


def embeddings(model: ModelConfig, member: nn.Module | None = None) -> np.ndarray:
    """As a run makes them: rows of a file, the loaded model, batches with padding."""
    dense, processor = load_dense(model)
    task: Any = get_task(with_own_settings(model))
    rows = task.normalize_rows([{"text": text} for text in TEXTS], DataConfig(), "calibration")
    return np.asarray(
        task.embed(torch_function(task, dense if member is None else member), EvaluationSet(rows, processor, 40, 4))
    )


@pytest.mark.slow
def test_folders_are_read_as_sentence_transformers_reads_them(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, model in (("qwen3", QWEN3), ("dense", WITH_DENSE)):
        found = embeddings(settings(folders[name]))
        np.testing.assert_allclose(found, model.embeddings(folders[name], TEXTS), atol=2e-5)
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    by_others = by_sentence_transformers(list(folders.values()), TEXTS, tmp_path)
    for folder, expected in zip(folders.values(), by_others, strict=True):
        np.testing.assert_allclose(embeddings(settings(folder)), expected, atol=2e-5)


def test_sentence_transformers_opens_members_as_the_original(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("optimum.onnxruntime", reason="optimum is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    members: list[Path] = []
    expected: list[np.ndarray] = []
    for name, folder in folders.items():
        model = settings(folder)
        dense, processor = load_dense(model)
        pruned = resize(dense, random_entries(dense, {"0.attention": 1, "1.ffn": 20, "2.attention": 0}))
        for kind, torch_model in (("dense", dense), ("pruned", pruned)):
            members.append(tmp_path / f"{name}-{kind}")
            save_member(members[-1], torch_model, processor, model, {})
            raw = {"name": "x", "model": with_own_settings(model).model_dump(), "speedups": [2]}
            raw["environment"] = {"workload": {"seq_len": 16}}
            export = OnnxExport.from_recipe(parse_recipe(raw), get_task(with_own_settings(model)))
            export.write(load(members[-1]), members[-1] / "model.onnx", name)
            expected.append(embeddings(model, torch_model))
    found = by_sentence_transformers(members, TEXTS, tmp_path, backend="onnx")
    for member, wanted, answers in zip(members, expected, found, strict=True):
        np.testing.assert_allclose(answers, wanted, atol=1e-4, err_msg=member.name)
    for model, folder, answers in zip((QWEN3, WITH_DENSE), folders.values(), found[::2], strict=True):
        np.testing.assert_allclose(answers, model.embeddings(folder, TEXTS), atol=1e-4)


def test_one_whose_tokens_attend_to_those_after_them_is_refused(tmp_path: Path) -> None:
    save_causal(tmp_path, "qwen2")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_causal": False}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="a qwen2 with is_causal False: its tokens attend to those after"):
        load_dense(settings(tmp_path / "model", pooling="lasttoken"))


def test_members_cut_texts_where_the_positions_of_their_file_end(tmp_path: Path) -> None:
    save_causal(tmp_path, "qwen3", max_position_embeddings=20_000)
    config = settings(tmp_path / "model", pooling="lasttoken")
    model, processor = load_dense(config)
    processor.model_max_length = 131_072
    assert longest_text(model) == MAX_POSITIONS
    save_member(tmp_path / "member", model, processor, config, {})
    fields = json.loads((tmp_path / "member" / "tokenizer_config.json").read_text())
    assert fields["model_max_length"] == MAX_POSITIONS
    (tmp_path / "short").mkdir()
    save_causal(tmp_path / "short", "qwen3", max_position_embeddings=64)
    assert longest_text(load_dense(settings(tmp_path / "short" / "model", pooling="lasttoken"))[0]) == 64


def test_a_model_that_names_no_pooling_or_has_learned_positions_is_refused(tmp_path: Path) -> None:
    save_causal(tmp_path, "qwen3")  # as a language model: its head is left out
    path = tmp_path / "model"
    with pytest.raises(RecipeError, match=r"expected model\.pooling for the causal model .*lasttoken"):
        load_dense(settings(path))
    model, _ = load_dense(settings(path, pooling="lasttoken"))
    assert not is_language_model(model)
    assert [module.structures for module in prunable_modules(model)[:2]] == [2, 64]
    (tmp_path / "learned").mkdir()
    save_causal(tmp_path / "learned", "gpt2")
    with pytest.raises(UnsupportedModelError, match="rotary positions for sentence-similarity, found a gpt2"):
        load_dense(settings(tmp_path / "learned" / "model", pooling="lasttoken"))
    with pytest.raises(UnsupportedModelError, match="expected an encoder for fill-mask, found the causal"):
        load_dense(ModelConfig(path=str(path), task="fill-mask"))
    save_dense(tmp_path / "bert")
    assert load_dense(settings(tmp_path / "bert"))[0].config.model_type == tiny_model("bert").config.model_type
