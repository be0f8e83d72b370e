"""Text from exported members: the tokens that transformers generates, batches, streams, stops, sampling, bad input."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from exporters import DecoderExportSettings, export_decoder
from tests.helpers.models import random_entries, tiny_causal_model, tiny_tokenizer
from tests.helpers.onnx_models import write_mlp
from ziplm_deploy import load_runner
from ziplm_deploy.engines.generator import Sampling, TextGenerator, _choose, text_behind
from ziplm_deploy.engines.worker.cache import CachedModel, too_old
from ziplm_deploy.errors import CorruptArtifactError, EngineError, UsageError
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.resizing import resize

pytestmark = pytest.mark.transformers

PROMPTS = ["the cat sat on the mat", "a dog", "who ran under a tree ?"]
SIZES = {"0.attention": 1, "0.ffn": 24, "1.attention": 0, "2.ffn": 0}
N_TOKENS = 10


@pytest.fixture(scope="module")
def model() -> Any:
    dense = tiny_causal_model("llama", hidden_size=64)
    return resize(dense, random_entries(dense, SIZES))


@pytest.fixture(scope="module", params=["onnxruntime", "portable"])
def folder(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    tiny_tokenizer(path / "words").save_pretrained(path)
    model.config.to_json_file(path / "config.json")
    (path / "generation_config.json").write_text('{"eos_token_id": [58, 59]}', encoding="utf-8")
    export_decoder(causal_parts(model), path / "model.onnx", DecoderExportSettings(max_length=32, form=request.param))
    return path


def greedy(model: Any, generator: TextGenerator, prompt: str, n_tokens: int = N_TOKENS) -> list[int]:
    """Tokens that follow a prompt, one full pass of torch for each."""
    ids = list(generator.tokenizer.encode(prompt).ids)
    start = len(ids)
    while len(ids) < start + n_tokens:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in (2, 58, 59):
            break
        ids.append(token)
    return ids[start:]


def test_continuations_are_those_of_torch_alone_and_in_a_batch(folder: Path, model: Any) -> None:
    generator = load_runner(folder)
    assert generator.end_ids == {2, 58, 59}
    expected = [generator.tokenizer.decode(greedy(model, generator, prompt)) for prompt in PROMPTS]
    assert any(expected)
    assert generator.generate(PROMPTS, max_new_tokens=N_TOKENS) == expected
    assert [generator.generate(prompt, max_new_tokens=N_TOKENS) for prompt in PROMPTS] == expected


def test_streams_give_the_same_text_piece_by_piece(folder: Path) -> None:
    generator = TextGenerator(folder)
    for prompt in PROMPTS:
        whole = generator.generate(prompt, max_new_tokens=N_TOKENS)
        pieces = list(generator.stream(prompt, max_new_tokens=N_TOKENS))
        assert "".join(pieces) == whole
        assert all(pieces)
    assert max(len(list(generator.stream(prompt, max_new_tokens=N_TOKENS))) for prompt in PROMPTS) > 3


def test_a_continuation_ends_before_a_text_to_stop_at(folder: Path) -> None:
    generator = TextGenerator(folder)
    prompt = max(PROMPTS, key=lambda each: len(generator.generate(each, max_new_tokens=N_TOKENS)))
    whole = generator.generate(prompt, max_new_tokens=N_TOKENS)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    assert generator.generate(prompt, N_TOKENS, stop=[stop, "never"]) == expected
    assert "".join(generator.stream(prompt, N_TOKENS, stop=[stop])) == expected
    assert generator.generate(prompt, N_TOKENS, stop=stop) == expected, "one text is no list of characters"


def test_inputs_of_a_call_live_as_long_as_the_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of ONNX Runtime before a certain one only borrow their memory."""
    bound: list[weakref.ref[Any]] = []
    inner = onnxruntime.IOBinding.bind_ortvalue_input

    def borrowed(binding: Any, name: str, value: Any) -> None:
        inner(binding, name, value)
        binding._bound_inputs = {}
        bound.append(weakref.ref(value))

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", borrowed)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    model = CachedModel(session, 1, 32)
    run = model.rehearsal(np.array([[5, 6, 7]]), 4)
    model.clear()
    gc.collect()
    assert bound
    assert all(each() is not None for each in bound)
    run()


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    generator = np.random.default_rng(0)

    def shares(**settings: Any) -> list[float]:
        counts = Counter(_choose(logits, Sampling(**settings), generator) for _ in range(4000))
        return [counts[token] / 4000 for token in range(3)]

    assert shares(temperature=1.0) == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx([0.01 / 0.46, 0.36 / 0.46, 0.09 / 0.46], abs=0.03)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.0, 2 / 3, 1 / 3], abs=0.03)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.0, 2 / 3, 1 / 3], abs=0.03)
    assert shares(temperature=1.0, top_p=0.5) == [0.0, 1.0, 0.0]
    assert shares() == [0.0, 1.0, 0.0]


def test_a_seed_gives_the_same_text_again(folder: Path) -> None:
    generator = TextGenerator(folder)
    texts = {generator.generate(PROMPTS[0], 8, Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2, 3, 4)}
    assert 1 < len(texts) <= 4
    assert generator.generate(PROMPTS[0], 8, Sampling(temperature=1.0, top_k=1)) == generator.generate(PROMPTS[0], 8)


def test_rehearsed_calls_take_any_length_and_leave_texts_as_they_were(folder: Path, model: Any) -> None:
    cached = CachedModel(TextGenerator(folder).session, batch_size=1, max_length=32)
    ids = np.array([[5, 9, 17]])
    expected = cached.call(ids, np.array([3]))
    for length in (0, 4, 29):
        run = cached.rehearsal(ids, length)
        run()
        run()
    cached.clear()
    np.testing.assert_allclose(cached.call(ids, np.array([3])), expected, atol=1e-6)


def test_a_cache_in_place_is_bound_once_for_calls_of_any_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = TextGenerator(folder).session
    ids = np.array([[5, 9, 17, 30, 8, 21, 4]])
    ends = (3, 4, 6, 7)
    expected = []
    for end in ends:
        whole = CachedModel(session, batch_size=1, max_length=32).call(ids[:, :end], np.array([end]))
        expected.append(whole[:, -1])
    bindings: list[Any] = []
    inner = onnxruntime.InferenceSession.io_binding
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "io_binding", lambda self: bindings.append(inner(self)) or bindings[-1]
    )
    cached = CachedModel(session, batch_size=1, max_length=16)
    for number, (start, end) in enumerate(itertools.pairwise((0, *ends))):
        found = cached.call(ids[:, start:end], np.array([end - start]))
        np.testing.assert_allclose(found[:, -1], expected[number], atol=1e-5)
    assert len(bindings) == (1 if cached.in_place else len(ends))


@pytest.mark.parametrize("changed", ["reorder", "grow"])
def test_buffers_that_were_replaced_are_bound_anew(folder: Path, changed: str) -> None:
    texts = np.array([[5, 9, 17], [30, 8, 21]])
    counts, end = np.array([3, 3]), np.array([[4], [4]])
    rows = [1, 0] if changed == "reorder" else [0, 1]
    session = TextGenerator(folder).session
    whole = CachedModel(session, batch_size=2, max_length=8)
    expected = whole.call(np.concatenate([texts[rows], end], axis=1), counts + 1)[:, -1]
    cached = CachedModel(session, batch_size=2, max_length=3 if changed == "grow" else 8)
    cached.call(texts, counts)
    if changed == "grow":
        cached.grow(8)
    else:
        cached.reorder(np.array(rows))
    np.testing.assert_allclose(cached.call(end, np.array([1, 1]))[:, -1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([], {}, "found 0 prompts"),
        ("the cat", {"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ("the cat", {"max_new_tokens": 31}, "within 32 tokens, found 4 in prompt 1"),
        (["the cat", "the " * 40], {"max_new_tokens": 4}, "in prompt 2"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(folder: Path, prompts: Any, settings: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TextGenerator(folder).generate(prompts, **settings)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected temperature >= 0"):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("needed", "version", "refused"),
    [(">=1.24", "1.23.2", True), (">=1.24", "1.24.0", False), (">=1.20", "1.9.1", True), ("", "1.0.0", False)],
)
def test_files_of_newer_engines_are_told_by_their_metadata(needed: str, version: str, refused: bool) -> None:
    metadata = SimpleNamespace(custom_metadata_map={"onnxruntime": needed} if needed else {})
    reason = too_old(SimpleNamespace(get_modelmeta=lambda: metadata), version)
    assert reason.startswith(f"expected onnxruntime {needed.lstrip('>=')} or later") == refused
    assert bool(reason) == refused


def test_a_file_that_this_engine_would_answer_wrong_for_is_refused(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "member"))
    file = onnx.load(copied / "model.onnx")
    next(item for item in file.metadata_props if item.key == "onnxruntime").value = ">=99.0"
    onnx.save(file, copied / "model.onnx")
    with pytest.raises(EngineError, match="pip install -U onnxruntime"):
        load_runner(copied)


def test_folders_that_hold_no_text_generator_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match=r"expected model.onnx in .*found none"):
        TextGenerator(tmp_path)
    write_mlp(tmp_path / "model.onnx", 8)
    with pytest.raises(UsageError, match="expected a causal language model with a cache"):
        TextGenerator(tmp_path)
    for name in ("tokenizer.json", "config.json"):
        broken = tmp_path / f"without-{name}"
        shutil.copytree(folder, broken)
        (broken / name).write_text(json.dumps([]) if name == "tokenizer.json" else "{", encoding="utf-8")
        with pytest.raises(CorruptArtifactError, match=name):
            TextGenerator(broken)


def test_an_answer_keeps_the_space_that_it_begins_with() -> None:
    """SentencePiece's decoders strip the first space of what they decode."""
    words = {
        1: "\N{LOWER ONE EIGHTH BLOCK}The",
        2: "\N{LOWER ONE EIGHTH BLOCK}end",
        3: "s",
        4: "\N{REPLACEMENT CHARACTER}",
    }

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").removeprefix(" ")

    assert text_behind(decode, [1], [2, 3]) == " ends"
    assert text_behind(decode, [2], [3]) == "s"
    assert text_behind(decode, [], [2]) == "end"
    assert text_behind(decode, [4], [2]) == "end"  # behind half a character nobody can tell
