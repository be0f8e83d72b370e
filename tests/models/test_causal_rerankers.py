"""Language models that rank by yes and no: as their model card, as a classifier, in ONNX, and in CrossEncoder."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from tests.helpers.models import random_entries, save_dense
from tests.helpers.reranker_models import (
    CHAT_TEMPLATE,
    PAIRS,
    TASK,
    by_model_card,
    save_reranker,
    words_tokenizer,
)
from tests.helpers.sentence_models import write
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import CorruptArtifactError, DataError, RecipeError, UnsupportedModelError, ZipLMError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.deployed import OnnxExport
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.own_settings import with_own_settings
from ziplm_deploy.models.resizing import masked, resize
from ziplm_deploy.recipe import DataConfig, ModelConfig, parse_recipe
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function

pytestmark = pytest.mark.transformers

MAX_LENGTH = 128  # tokens; cuts the third pair
ROWS: list[dict[str, Any]] = [{"text": query, "text_pair": document} for query, document in PAIRS]
SIZES = {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "2.ffn": 0}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": "1_LogitScore",
        "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
    },
]
_LOGITS = {"method": "forward", "method_output_name": "logits"}


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "task": "reranking", **changes})


def task_of(model: ModelConfig) -> Any:
    return get_task(with_own_settings(model))


def scores(model: ModelConfig, function: Any = None, rows: list[dict[str, Any]] = ROWS) -> np.ndarray:
    """Logits of the pairs as a run computes them, in padded batches; by the loaded model, or by a function."""
    dense, processor = load_dense(model)
    task = task_of(model)
    data = EvaluationSet(rows, processor, MAX_LENGTH, batch_size=3)
    return task.predict(function or torch_function(task, dense), data)[:, 0]  # type: ignore[no-any-return]


def chance(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def with_modules(folder: Path, tokens: dict[str, Any], prompts: dict[str, str] | None = None) -> Path:
    """Add what releases of sentence-transformers from 5.4 on read of a language model that ranks."""
    write(folder / "modules.json", MODULES)
    write(folder / "1_LogitScore" / "config.json", tokens)
    texts = {"transformer_task": "text-generation", "module_output_name": "causal_logits"}
    modalities = {"text": _LOGITS, "message": {**_LOGITS, "format": "flat"}}
    write(folder / "sentence_bert_config.json", {**texts, "modality_config": modalities})
    default = {"default_prompt_name": next(iter(prompts))} if prompts else {}
    write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}, **default})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    save_reranker(folder)
    return folder


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_the_model_card(tied: bool, padding_side: str, tmp_path: Path) -> None:
    save_reranker(tmp_path, padding_side=padding_side, tie_word_embeddings=tied)
    expected = by_model_card(tmp_path, PAIRS, MAX_LENGTH)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(chance(scores(settings(tmp_path))), expected, atol=1e-5)
    other = by_model_card(tmp_path, PAIRS, MAX_LENGTH, "who sat ?")
    assert np.abs(other - expected).max() > 1e-3
    np.testing.assert_allclose(chance(scores(settings(tmp_path, instruction="who sat ?"))), other, atol=1e-5)


@pytest.mark.parametrize("form", ["onnxruntime", "portable"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_masked_equals_resized_equals_reloaded_equals_onnx(model_type: str, form: str, tmp_path: Path) -> None:
    for side in ("left", "right"):
        place = tmp_path / side
        save_reranker(place, model_type, side)
        model = settings(place, pair_prompt="qwen3-reranker")
        dense, processor = load_dense(model)
        entries = random_entries(dense, SIZES)
        resized, task = resize(dense, entries), task_of(model)
        expected = scores(model, torch_function(task, masked(dense, entries)))
        assert np.abs(expected - scores(model)).max() > 1e-2
        np.testing.assert_allclose(scores(model, torch_function(task, resized)), expected, atol=1e-4)
        save_member(place / "member", resized, processor, model, {})
        again = load(place / "member")
        assert type(again).__name__ == {"qwen3": "Qwen3", "llama": "Llama"}[model_type] + "ForSequenceClassification"
        np.testing.assert_allclose(scores(model, torch_function(task, again)), expected, atol=1e-4)
        path = write_onnx(place, model, again, form)
        np.testing.assert_allclose(scores(model, onnx_runner(path)), expected, atol=1e-4)
    graph = onnx.load(path).graph
    assert [item.name for item in graph.input] == ["input_ids", "attention_mask"]
    assert [item.name for item in graph.output] == ["logits"]


def write_onnx(folder: Path, model: ModelConfig, module: Any, form: str, shapes: str = "dynamic") -> Path:
    raw = {
        "name": "a",
        "model": with_own_settings(model).model_dump(),
        "speedups": [2],
        "export": {"cache_form": form, "shapes": shapes},
        "environment": {"workload": {"seq_len": MAX_LENGTH, "batch_size": 2}},
    }
    path = folder / "model.onnx"
    OnnxExport.from_recipe(parse_recipe(raw), get_task("reranking")).write(module, path, "member")
    return path


def test_static_files_have_fixed_shapes(folder: Path, tmp_path: Path) -> None:
    dense, _ = load_dense(settings(folder))
    graph = onnx.load(write_onnx(tmp_path, settings(folder), dense, "portable", "static")).graph
    sizes = {
        item.name: [axis.dim_value for axis in item.type.tensor_type.shape.dim]
        for item in (*graph.input, *graph.output)
    }
    assert sizes == {"input_ids": [2, MAX_LENGTH], "attention_mask": [2, MAX_LENGTH], "logits": [2, 1]}


def test_a_converted_checkpoint_ranks_alike_once_its_prompt_is_named(folder: Path, tmp_path: Path) -> None:
    dense, processor = load_dense(settings(folder))
    copy.deepcopy(dense).save_pretrained(tmp_path)  # type: ignore[operator]
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    with pytest.raises(RecipeError, match=r"model\.pair_prompt for the causal reranker .*qwen3-reranker"):
        load_dense(settings(tmp_path))
    named = settings(tmp_path, pair_prompt="qwen3-reranker")
    np.testing.assert_allclose(scores(named), scores(settings(folder)), atol=1e-6)
    plain = settings(tmp_path, pair_prompt="")
    tokens = [processor(*pair)["input_ids"] for pair in PAIRS[:2]]
    found = task_of(plain).tokenized(ROWS[:2], processor, MAX_LENGTH)
    assert [example["input_ids"] for example in found] == tokens
    assert load_dense(plain)[1].chat_template is None
    with pytest.raises(RecipeError, match=r"no model\.answer_tokens for .*a head of its own"):
        load_dense(settings(tmp_path, pair_prompt="", answer_tokens=["yes"]))


def test_answers_are_those_of_the_files_or_of_the_recipe(tmp_path: Path) -> None:
    language_model: Any = save_reranker(tmp_path)
    vocabulary = words_tokenizer().get_vocab()
    head = language_model.lm_head.weight.detach()

    def direction(**changes: Any) -> torch.Tensor:
        return load_dense(settings(tmp_path, **changes))[0].score.weight[0]  # type: ignore[no-any-return, union-attr]

    def row(word: str) -> torch.Tensor:
        return head[vocabulary[word]]  # type: ignore[no-any-return]

    torch.testing.assert_close(direction(), row("yes") - row("no"))
    torch.testing.assert_close(direction(answer_tokens=["cat", "dog"]), row("cat") - row("dog"))
    with_modules(tmp_path, {"true_token_id": vocabulary["mat"], "false_token_id": vocabulary["tree"]})
    torch.testing.assert_close(direction(), row("mat") - row("tree"))
    torch.testing.assert_close(direction(answer_tokens=["cat", "dog"]), row("cat") - row("dog"))
    with_modules(tmp_path, {"true_token_id": vocabulary["mat"], "false_token_id": None}, {"ask": "who sat ?"})
    torch.testing.assert_close(direction(), row("mat"))
    assert with_own_settings(settings(tmp_path)).instruction == "who sat ?"
    assert with_own_settings(settings(tmp_path, instruction="who ?")).instruction == "who ?"
    (tmp_path / "modules.json").unlink()
    assert with_own_settings(settings(tmp_path)).instruction == TASK


# in other loaders


def test_members_keep_the_prompt_as_a_chat_template(folder: Path, tmp_path: Path) -> None:
    model = settings(folder)
    dense, processor = load_dense(model)
    save_member(tmp_path, dense, processor, model, {})
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    for instruction in (None, 'who "sat" {query} %}\\n ?'):
        told = settings(folder) if instruction is None else settings(folder, instruction=instruction)
        expected = task_of(told).tokenized(ROWS, processor, 200)
        for row, example in zip(ROWS, expected, strict=True):
            messages = [{"role": "query", "content": row["text"]}, {"role": "document", "content": row["text_pair"]}]
            if instruction is not None:
                messages.insert(0, {"role": "system", "content": instruction})
            found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            assert found["input_ids"] == example["input_ids"]


def by_cross_encoder(code: str, scratch: Path, *arguments: Path) -> list[np.ndarray]:
    """Scores of the CrossEncoders that ``code`` calls ``models``; it has the ``arguments`` as ``folders``.

    In a process of its own: its import changes settings of other packages.
    """
    begin = "import json, sys, numpy; from sentence_transformers import CrossEncoder as C\nfolders = sys.argv[3:]\n"
    end = "\nnumpy.save(sys.argv[2], [model.predict(json.loads(sys.argv[1])) for model in models])"
    command = [sys.executable, "-W", "ignore", "-c", begin + code + end, json.dumps(PAIRS), scratch / "found.npy"]
    subprocess.run([*map(str, command), *map(str, arguments)], check=True)
    return list(np.load(scratch / "found.npy"))


@pytest.mark.slow
def test_cross_encoder_scores_alike(folder: Path, tmp_path: Path) -> None:
    """A language model with LogitScore and the chat template of its files, and a member from our loader in a converted
    one; cut texts keep what follows them."""
    pytest.importorskip("sentence_transformers.cross_encoder.modules", reason="no sentence-transformers from 5.4 on")
    save_reranker(tmp_path / "words")
    vocabulary = words_tokenizer().get_vocab()
    with_modules(tmp_path / "words", {"true_token_id": vocabulary["yes"], "false_token_id": vocabulary["no"]})
    model = settings(folder)
    dense, processor = load_dense(model)
    copy.deepcopy(dense).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    processor.save_pretrained(tmp_path / "dense")
    resized = resize(dense, random_entries(dense, SIZES))
    save_member(tmp_path / "member", resized, processor, model, {})
    code = (
        f"import ziplm_deploy\nmodels = [C(folder, device='cpu', max_length={MAX_LENGTH}) for folder in folders[:2]]\n"
        "models[1][0].model = ziplm_deploy.load(folders[2])"
    )
    places = [tmp_path / name for name in ("words", "dense", "member")]
    found, of_member = by_cross_encoder(code, tmp_path, *places)
    np.testing.assert_allclose(found, chance(scores(settings(tmp_path / "words"))), atol=1e-5)
    np.testing.assert_allclose(of_member, chance(scores(model, torch_function(task_of(model), resized))), atol=1e-5)


def test_cross_encoder_opens_a_member(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers.cross_encoder.modules", reason="no sentence-transformers from 5.4 on")
    pytest.importorskip("optimum.onnxruntime", reason="optimum is not installed")
    model = settings(folder)
    dense, processor = load_dense(model)
    resized = resize(dense, random_entries(dense, SIZES))
    save_member(tmp_path, resized, processor, model, {})
    write_onnx(tmp_path, model, resized, "onnxruntime")
    code = (
        "models = [C(folders[0], backend='onnx', device='cpu', model_kwargs={'file_name': 'model.onnx'}, "
        f"max_length={MAX_LENGTH})]"
    )
    expected = scores(model, torch_function(task_of(model), resized))
    (found,) = by_cross_encoder(code, tmp_path, tmp_path)
    np.testing.assert_allclose(found, chance(expected), atol=1e-4)


# refused


def broken(folder: Path, **tokenizer: Any) -> Path:
    save_reranker(folder)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", {**fields, **tokenizer})
    return folder


def test_models_that_cannot_answer_are_refused(tmp_path: Path) -> None:
    save_reranker(tmp_path / "words")
    model = settings(tmp_path / "words", answer_tokens=["yes", "never"])
    with pytest.raises(UnsupportedModelError, match=r"'yes' and 'never' as one token .*found no 'never'; .*answer"):
        load_dense(model)
    with_modules(tmp_path / "words", {"true_token_id": 5000})
    with pytest.raises(CorruptArtifactError, match=r"LogitScore of .*found 5000"):
        load_dense(settings(tmp_path / "words"))
    write(tmp_path / "words" / "1_LogitScore" / "config.json", {"false_token_id": 3})
    with pytest.raises(CorruptArtifactError, match="true_token_id"):
        load_dense(settings(tmp_path / "words"))


def test_a_tokenizer_must_have_padding_that_ends_no_pair(tmp_path: Path) -> None:
    save_reranker(tmp_path / "none")
    words_tokenizer(without=("pad_token",)).save_pretrained(tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match=r"a token for padding for the causal reranker .*pad_token"):
        load_dense(settings(tmp_path / "none"))
    ending = settings(broken(tmp_path / "end", pad_token="<|im_end|>"), pair_prompt="{query} {document} <|im_end|>")
    with pytest.raises(UnsupportedModelError, match="end in another token than the one for padding"):
        load_dense(ending)


def test_prompts_are_for_causal_rerankers(tmp_path: Path) -> None:
    save_dense(tmp_path / "bert", "bert", "text-regression")
    with pytest.raises(RecipeError, match=r"no model\.pair_prompt for the encoder"):
        load_dense(settings(tmp_path / "bert", pair_prompt="qwen3-reranker"))
    save_reranker(tmp_path / "llama", "llama")
    with pytest.raises(RecipeError, match=r"model\.pair_prompt for the causal reranker"):
        load_dense(settings(tmp_path / "llama"))
    save_reranker(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UnsupportedModelError, match="rotary positions for reranking, found a gpt2"):
        load_dense(settings(tmp_path / "gpt2", pair_prompt=""))
    save_reranker(tmp_path / "classes", auto_class="SequenceClassification", num_labels=3)
    dense, _ = load_dense(settings(tmp_path / "classes", pair_prompt=""))
    with pytest.raises(DataError, match="one output for reranking, found one with 3"):
        get_task("reranking").check_labels([], dense.config)


def test_single_texts_and_prompts_that_fill_a_request_are_refused(folder: Path) -> None:
    task, processor = task_of(settings(folder)), words_tokenizer()
    with pytest.raises(DataError, match="whose models score a pair"):
        task.normalize_rows([{"text": "a dog ran"}], DataConfig(), "calibration")
    bare = len(task.tokenized([{"text": "", "text_pair": ""}], processor, 200)[0]["input_ids"])
    assert len(task.tokenized(ROWS, processor, bare + 1)[2]["input_ids"]) == bare + 1
    with pytest.raises(RecipeError, match=rf"more than the {bare} tokens of model\.pair_prompt .*found {bare}; raise"):
        task.tokenized(ROWS, processor, bare)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sentence_bert_config.json", {"transformer_task": "sequence-classification"}),
        ("sentence_bert_config.json", {"processing_kwargs": {"chat_template": {"other": 1}}}),
        ("1_LogitScore/config.json", {"true_token_id": 3, "module_input_name": "scores"}),
        ("modules.json", [MODULES[1]]),
    ],
)
def test_other_modules_are_refused(name: str, content: Any, tmp_path: Path) -> None:
    save_reranker(tmp_path)
    write(with_modules(tmp_path, {"true_token_id": 3}) / name, content)
    with pytest.raises(ZipLMError, match="expected"):
        load_dense(settings(tmp_path))
