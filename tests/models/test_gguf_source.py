"""GGUF checkpoints as dense models: read rightly, found by path, folder and package, refused where they cannot be."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exporters.decoder_parts import DecoderParts
from exporters.gguf_file import FileType
from exporters.gguf_tokenizer import PRE_TOKENIZERS
from tests.helpers.gguf_models import (
    END,
    END_ID,
    byte_level_tokenizer,
    log_probabilities,
    parts_of,
    rounded,
    sentencepiece_like,
    tiny_llama,
    write_gpt2,
    write_llama,
)
from tests.helpers.models import shaken
from ziplm_deploy.errors import CorruptArtifactError, EnvironmentMismatchError, UnsupportedModelError
from ziplm_deploy.models import dense
from ziplm_deploy.models.dense import load_dense, load_processor
from ziplm_deploy.models.gguf_source import (
    GgufSummary,
    check_gguf,
    gguf_file_of,
    load_gguf_config,
    load_gguf_model,
)
from ziplm_deploy.models.gguf_tokenizer import load_gguf_tokenizer
from ziplm_deploy.models.inspection import inspect_model
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import prunable_modules
from ziplm_deploy.recipe import ModelConfig

gguf = pytest.importorskip("gguf", reason="reads GGUF files; in the extra llamacpp")

PROMPT = [5, 77, 129, 9, 100, 31, 8]


@pytest.fixture(scope="module")
def parts() -> DecoderParts:
    return parts_of(tiny_llama())


@pytest.mark.transformers
@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_0"])
def test_answers_are_those_of_the_weights_in_the_file(tmp_path: Path, parts: DecoderParts, file_type: FileType) -> None:
    file = write_llama(tmp_path / "model.gguf", parts, file_type=file_type)
    assert check_gguf(file) == GgufSummary("llama", tuple(sorted({"F32", file_type})))
    config = load_gguf_config(file)
    model = load_gguf_model(file, config)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size) == (3, 2, 96)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not model.training
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1], dim=-1)
    expected = log_probabilities(parts if file_type == "F16" else rounded(parts, file_type), PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.transformers
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_tokenizers_come_back_whole(tmp_path: Path, parts: DecoderParts, name: str, start: bool) -> None:
    tokenizer = byte_level_tokenizer(name, start)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    found = load_gguf_tokenizer(write_llama(tmp_path / "model.gguf", parts, tokenizer=tokenizer))
    for text in ("the cat's 123 and 12\n\n the end", f"a{END}the <word>the\n 12", "\n\n\n  the\tTHE'S"):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (*[END_ID] * 3, None)
    assert found.chat_template == tokenizer.chat_template
    assert set(found("a")) == {"input_ids", "attention_mask"}


@pytest.mark.transformers
@pytest.mark.parametrize("spaces", ["prepended", "never"])
def test_sentencepiece_tokenizers_come_back_whole(tmp_path: Path, spaces: str) -> None:
    parts = parts_of(tiny_llama(vocab_size=288))
    tokenizer = sentencepiece_like(spaces)
    found = load_gguf_tokenizer(write_llama(tmp_path / "model.gguf", parts, tokenizer=tokenizer))
    for text in ("the thing and the ant", "  and      thinking, in! Ωx\n", "an</s>the thing</s> the"):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.decode(found("the thing", add_special_tokens=False)["input_ids"]) == "the thing"
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (1, 2, None, 0)


def test_where_a_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packaged_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    file = package / "model.gguf"
    file.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gguf_file_of("package:packaged-model") == file
    assert gguf_file_of(str(package)) == file
    assert gguf_file_of(str(file)) == file
    assert gguf_file_of("organization/name") is None
    (package / "config.json").touch()
    assert gguf_file_of("package:packaged-model") is None
    assert gguf_file_of(str(package)) is None


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a GGUF file at .*none\.gguf, found none"):
        gguf_file_of(str(tmp_path / "none.gguf"))
    with pytest.raises(EnvironmentMismatchError, match="no-such-package"):
        gguf_file_of("package:no-such-package")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UnsupportedModelError, match=r"one GGUF file .* found a\.gguf, b\.gguf"):
        gguf_file_of(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "mamba"}, "architecture gpt2, llama, qwen2, qwen3, found mamba"),
        ({"architecture": "deci"}, "found deci .*prune the model that it was made from"),
        ({"factors": True}, r"plain rotary positions .*Llama 3\.1"),
        ({"change": lambda writer: writer.add_string("llama.rope.scaling.type", "yarn")}, "scaling of kind yarn"),
        ({"change": lambda writer: writer.add_uint16("split.count", 3)}, "one of 3 parts .* --merge"),
    ],
)
def test_files_that_transformers_cannot_read(
    tmp_path: Path, parts: DecoderParts, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_gguf(write_llama(tmp_path / "model.gguf", parts, **settings))


def test_types_that_cannot_be_turned_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"turns back into numbers .* found Q8_K; give a file in F16"):
        check_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_damaged_files(tmp_path: Path, parts: DecoderParts, share: float) -> None:
    file = write_llama(tmp_path / "model.gguf", parts)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnsupportedModelError, match="a whole GGUF file"):
        check_gguf(file)
    file.write_bytes(b"no GGUF file at all, but some text that is long enough")
    with pytest.raises(UnsupportedModelError, match="a whole GGUF file"):
        check_gguf(file)


@pytest.mark.transformers
def test_a_gpt2_is_read_too(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    original = shaken(transformers.GPT2LMHeadModel(config), 0)
    file = write_gpt2(tmp_path / "model.gguf", original, tokenizer)
    model, read = load_dense(ModelConfig(path=str(file), task="text-generation"))
    with torch.no_grad():
        answers = [each(torch.tensor([PROMPT])).logits for each in (original, model)]
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    assert read("the 12").input_ids == tokenizer("the 12").input_ids
    assert [module.name for module in prunable_modules(model)] == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    short = shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config.to_dict(), "n_positions": 64})), 0)
    with pytest.raises(CorruptArtifactError, match="a model that transformers can build"):
        load_dense(ModelConfig(path=str(write_gpt2(file, short, tokenizer, 64)), task="text-generation"))


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (b"llama.block_count", b"llama.block_count", "asked for at byte"),  # the type of its value is changed below
        (b"llama.feed_forward_length", b"llama.rope.dimension_count", "twice"),
    ],
)
def test_headers_whose_lengths_do_not_fit(
    tmp_path: Path, parts: DecoderParts, before: bytes, after: bytes, found: str
) -> None:
    file = write_llama(tmp_path / "model.gguf", parts)
    content = bytearray(file.read_bytes())
    at = content.index(before)
    if before == after:
        content[at + len(before) :] = struct.pack("<IIQ", 9, 0, 1 << 20) + content[at + len(before) + 16 :]
    else:
        content[at - 8 : at + len(before)] = struct.pack("<Q", len(after)) + after
    file.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=f"a whole GGUF file .*{found}"):
        check_gguf(file)


def test_a_tensor_of_another_name_is_missed(tmp_path: Path, parts: DecoderParts) -> None:
    """transformers would give its weights random numbers."""
    file = write_llama(tmp_path / "model.gguf", parts)
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_w.weight"))
    with pytest.raises(CorruptArtifactError, match=r"no tensor, .*layers\.1\.self_attn\.q_proj\.weight"):
        load_gguf_model(file, load_gguf_config(file))


def test_biases_that_transformers_leaves_out_are_refused(tmp_path: Path, parts: DecoderParts) -> None:
    """Models of other kinds in Llama's clothes have some."""
    file = write_llama(tmp_path / "model.gguf", parts)
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_norm.weight", b"blk.1.attn_ab.qq.bias"))
    with pytest.raises(UnsupportedModelError, match=r"it leaves out of a llama \(blk\.1\.attn_ab\.qq\.bias"):
        check_gguf(file)


@pytest.mark.parametrize("kind", [0, 8])
def test_a_list_of_any_length_is_refused_at_once(tmp_path: Path, parts: DecoderParts, kind: int) -> None:
    """Of bytes, which the package would read without end, and of texts."""
    file = write_llama(tmp_path / "model.gguf", parts)
    content = bytearray(file.read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key)
    assert struct.unpack_from("<II", content, at) == (9, 5)
    struct.pack_into("<IQ", content, at + 4, kind, 1 << 40)
    file.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="lists of more than"):
        check_gguf(file)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("llama.block_count", 10**9, r"block_count from 1 to 1024 .* found 1000000000"),
        ("llama.attention.head_count", 0, "attention.head_count from 1"),
        ("llama.embedding_length", 1 << 19, "LlamaForCausalLM that config.json describes|transformers can build"),
        ("llama.block_count", 1000, "tensors of 1000 layers .* found those of"),
        ("tokenizer.ggml.bos_token_id", 10**6, "a whole tokenizer"),
    ],
)
def test_keys_that_the_tensors_do_not_bear_out(
    tmp_path: Path, parts: DecoderParts, key: str, value: int, match: str
) -> None:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_uint32(key, value)

    path = write_llama(tmp_path / "a.gguf", parts, tokenizer=byte_level_tokenizer("gpt-2"), change=change)
    with pytest.raises(CorruptArtifactError, match=match):
        load_dense(ModelConfig(path=str(path), task="text-generation"))


def test_a_tokenizer_with_more_tokens_than_the_file_has_embeddings(
    tmp_path: Path, parts: DecoderParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level_tokenizer("gpt-2")
    path = write_llama(tmp_path / "a.gguf", parts, tokenizer=tokenizer)
    tokenizer.add_tokens([f"newt{number}" for number in range(len(parts.embedding))])
    monkeypatch.setattr(dense, "load_gguf_tokenizer", lambda file: tokenizer)
    with pytest.raises(UnsupportedModelError, match="tokens 0 to"):
        load_dense(ModelConfig(path=str(path), task="text-generation"))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'ziplm-deploy\[llamacpp\]'"):
        check_gguf(tmp_path / "model.gguf")


def test_tokenizers_that_cannot_be_read(tmp_path: Path, parts: DecoderParts) -> None:
    def with_key(key: str, value: str) -> Path:
        def change(writer: Any) -> None:
            del writer.kv_data[0][key]
            writer.add_string(key, value)

        return write_llama(tmp_path / f"{value}.gguf", parts, change=change)

    with pytest.raises(UnsupportedModelError, match=r"of kind gpt2 or llama .* found rwkv"):
        load_gguf_tokenizer(with_key("tokenizer.ggml.model", "rwkv"))
    with pytest.raises(UnsupportedModelError, match=r"splits text like gpt-2, .* found deepseek-llm"):
        load_gguf_tokenizer(with_key("tokenizer.ggml.pre", "deepseek-llm"))


def test_runs_and_inspect_take_a_file_as_their_model(
    tmp_path: Path, parts: DecoderParts, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_tokenizer("gpt-2")
    path = write_llama(tmp_path / "a.gguf", parts, tokenizer=tokenizer)
    model, processor = load_dense(ModelConfig(path=str(path), task="text-generation"))
    assert model.config.use_cache is False
    save_member(tmp_path / "member", model, processor, ModelConfig(path=str(path), task="text-generation"), {})
    ids = torch.tensor([PROMPT])
    assert torch.equal(load(tmp_path / "member")(ids).logits, model(ids).logits)
    assert processor("any text")["input_ids"] == tokenizer("any text")["input_ids"]
    assert (
        processor("any text")["input_ids"]
        == load_processor(ModelConfig(path=str(path), task="text-generation"))("any text")["input_ids"]
    )
    assert [row["heads"] for row in inspect_model(str(path))] == [parts.layers[0].attention.n_kv_heads] * len(
        parts.layers
    )
    assert capsys.readouterr().err == ""
    with pytest.raises(UnsupportedModelError, match="expected an encoder for fill-mask, found the causal"):
        load_dense(ModelConfig(path=str(path), task="fill-mask"))
