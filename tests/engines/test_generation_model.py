"""``generate()`` of transformers over exported members: what the torch model generates, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

from exporters import DecoderExportSettings, export_decoder
from tests.helpers.models import random_entries, tiny_causal_model, tiny_tokenizer
from tests.helpers.onnx_models import write_mlp
from ziplm_deploy import load_generation_model
from ziplm_deploy.engines import generation_model
from ziplm_deploy.errors import CorruptArtifactError, UsageError
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.resizing import resize

pytestmark = pytest.mark.transformers

PROMPTS = ["the cat sat on the mat", "a dog", "who ran under a tree ?"]


@pytest.fixture(scope="module")
def model() -> Any:
    dense = tiny_causal_model("llama", hidden_size=64)
    return resize(dense, random_entries(dense, {"0.attention": 1, "1.attention": 0, "2.ffn": 0})).eval()


@pytest.fixture(scope="module", params=["onnxruntime", "portable"])
def folder(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    tiny_tokenizer(path / "words").save_pretrained(path)
    model.config.to_json_file(path / "config.json")
    export_decoder(causal_parts(model), path / "model.onnx", DecoderExportSettings(max_length=32, form=request.param))
    return path


@pytest.fixture
def batch(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = tiny_tokenizer(folder / "words")
    tokenizer.padding_side = "left"
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 8, "temperature": 0.7},
    ],
)
def test_tokens_are_those_that_the_torch_model_generates(
    folder: Path, model: Any, batch: dict[str, torch.Tensor], settings: dict[str, Any]
) -> None:
    common = {"max_new_tokens": 8, "pad_token_id": 0, **settings}
    torch.manual_seed(5)
    # Without its own cache: that of transformers asks the configuration for heads, which differ by layer here.
    expected = model.generate(**batch, use_cache=False, **common)
    torch.manual_seed(5)
    found = load_generation_model(folder).generate(**batch, **common)
    assert torch.equal(found, expected)


def test_calls_after_the_first_compute_one_token(
    folder: Path, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load_generation_model(folder)
    counted: list[int] = []
    call = generation_model.CachedModel.call

    def counting(self: Any, ids: Any, counts: Any) -> Any:
        counted.append(ids.shape[1])
        return call(self, ids, counts)

    monkeypatch.setattr(generation_model.CachedModel, "call", counting)
    generator.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert counted == [batch["input_ids"].shape[1], *[1] * 5]


def test_a_cache_that_is_outgrown_keeps_what_it_holds(
    folder: Path, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = load_generation_model(folder).generate(**batch, **common)
    monkeypatch.setattr(generation_model, "ROOM", 1)
    assert torch.equal(load_generation_model(folder).generate(**batch, **common), expected)


def test_text_streams_as_it_comes(folder: Path) -> None:
    tokenizer = tiny_tokenizer(folder / "words")
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    common = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    whole = load_generation_model(folder).generate(ids, streamer=streamer, **common)
    assert "".join(streamer) == tokenizer.decode(whole[0, ids.shape[1] :])


def test_new_texts_do_not_see_those_before(folder: Path, batch: dict[str, torch.Tensor]) -> None:
    generator = load_generation_model(folder)
    one = {name: value[1:2] for name, value in batch.items()}
    common = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    expected = load_generation_model(folder).generate(**one, **common)
    generator.generate(**batch, **common)
    assert torch.equal(generator.generate(**one, **common), expected)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    generator = load_generation_model(folder)
    with pytest.raises(UsageError, match=r"within 32 tokens, found 33"):
        generator.forward(torch.ones(1, 33, dtype=torch.int64))
    with pytest.raises(UsageError, match="tokens in every row, found none in row 1"):
        generator.forward(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(CorruptArtifactError, match=r"none\.onnx"):
        load_generation_model(folder, "none.onnx")
    write_mlp(tmp_path / "model.onnx", 4)
    with pytest.raises(UsageError, match="causal language model with a cache"):
        load_generation_model(tmp_path)
    other = tmp_path / "no-type"
    shutil.copytree(folder, other)
    settings = json.loads((other / "config.json").read_text(encoding="utf-8"))
    settings.pop("model_type")
    (other / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="expected a model_type"):
        load_generation_model(other)
