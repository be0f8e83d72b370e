"""Text that a causal language model writes: by the scheme, plain, enough of it, and the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import tiny_causal_model, tiny_tokenizer
from ziplm_deploy.errors import CorruptArtifactError, RecipeError
from ziplm_deploy.progress import Progress
from ziplm_deploy.recipe import DataConfig, GeneratedConfig, ModelConfig
from ziplm_deploy.recovery.self_data import SampledTexts, TextSampler, special_ids, start_ids
from ziplm_deploy.tasks import get_task

pytestmark = pytest.mark.transformers

CONTEXT, BEGIN, END = 12, 2, 3  # [CLS] and [SEP]
PLAIN = range(5, 19)  # the vocabulary without special tokens; the model has 60 embeddings


@pytest.fixture
def words(tmp_path: Path) -> Any:
    """A tokenizer that puts a start token before texts, and has one that ends them."""
    processor: Any = tiny_tokenizer(tmp_path / "words")
    processor.bos_token, processor.eos_token = "[CLS]", "[SEP]"
    return processor


@pytest.fixture(scope="module")
def model() -> Any:
    """A model of few ends: a text of 12 tokens has one now and then."""
    return tiny_causal_model("llama", eos_token_id=END)


def sampled(model: Any, processor: Any, folder: Path, seed: int = 0, **settings: Any) -> SampledTexts:
    config = GeneratedConfig(**{"n_windows": 20, "batch_size": 8, **settings})
    return TextSampler(model, processor, config, CONTEXT).sample(seed, folder / "parts", Progress())


def likeliest(model: Any, ids: list[int], allowed: set[int]) -> list[int]:
    """The likeliest tokens among those allowed, the first of a text and that after each of ``ids``; no cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[BEGIN, *ids]])).logits[0]  # [1 + ids, vocabulary]
    chosen = torch.tensor(sorted(allowed))
    return chosen[logits[:, chosen].argmax(dim=1)].tolist()


def test_texts_begin_at_random_go_on_with_the_likeliest_and_are_drawn_from_there(
    model: Any, words: Any, tmp_path: Path
) -> None:
    texts = sampled(model, words, tmp_path)
    assert len({ids[0] for ids in texts.ids}) > 5
    for ids in texts.ids:
        assert set(ids) <= set(PLAIN)
        assert 5 <= len(ids) <= CONTEXT
        assert ids[1:5] == likeliest(model, ids[:4], set(PLAIN))[1:]
    assert any(ids[5] != likeliest(model, ids[:5], {*PLAIN, END})[-1] for ids in texts.ids if len(ids) > 5)
    assert texts.texts[0] == words.decode(texts.ids[0])


def test_a_cache_changes_nothing(model: Any, words: Any, tmp_path: Path) -> None:
    for ids in sampled(model, words, tmp_path, top_p=1e-6, greedy_tokens=0).ids:
        following = likeliest(model, ids, {*PLAIN, END})
        assert ids[1:] == following[1:-1]
        assert len(ids) == CONTEXT or following[-1] == END


def test_there_are_as_many_windows_as_asked_for_though_texts_end_early(model: Any, words: Any, tmp_path: Path) -> None:
    task, data = get_task(ModelConfig(path="x", task="text-generation")), DataConfig(context=CONTEXT)
    for end in ("[SEP]", None):
        words.eos_token = end
        texts = sampled(model, words, tmp_path / str(end))
        assert any(len(ids) < CONTEXT for ids in texts.ids)
        windows = task.settle_rows([{"ids": ids} for ids in texts.ids], data, "train", 0, words)
        assert len(windows) in (20, 21)
        assert any(END in row["input_ids"] for row in windows) == (end is not None)


def test_a_killed_sampling_goes_on_to_the_same_texts(
    model: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sampled(model, words, tmp_path / "whole")
    genuine, made = TextSampler._batch, []

    def batch(self: TextSampler, size: int, seed: int) -> SampledTexts:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(size)
        return genuine(self, size, seed)

    with monkeypatch.context() as patch:
        patch.setattr(TextSampler, "_batch", batch)
        with pytest.raises(KeyboardInterrupt):
            sampled(model, words, tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert set(stamps) == {"0.json", "1.json"}
    assert sampled(model, words, tmp_path).ids == whole.ids
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    (tmp_path / "parts" / "1.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"parts/1.json"):
        sampled(model, words, tmp_path)


def test_the_seed_decides_and_the_callers_numbers_stay(model: Any, words: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    one = sampled(model, words, tmp_path / "a")
    assert torch.equal(torch.rand(2), wanted)
    assert sampled(model, words, tmp_path / "b").ids == one.ids
    assert sampled(model, words, tmp_path / "c", seed=1).ids != one.ids


def test_the_models_own_settings_of_generation_are_left_aside(words: Any, tmp_path: Path) -> None:
    model: Any = tiny_causal_model("llama", eos_token_id=END)
    plain = sampled(model, words, tmp_path / "plain")
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.top_k = 1
    own = model.generation_config
    assert sampled(model, words, tmp_path / "penalized").ids == plain.ids
    assert model.generation_config is own


def test_first_tokens_can_be_the_models_own(model: Any, words: Any, tmp_path: Path) -> None:
    texts = sampled(model, words, tmp_path, first_token="model", greedy_tokens=0, top_p=1e-6)
    assert {ids[0] for ids in texts.ids} == set(likeliest(model, [], set(PLAIN)))
    assert max(map(len, texts.ids)) <= CONTEXT
    words.bos_token = words.eos_token = None
    with pytest.raises(RecipeError, match=r"data.generated.first_token: model, found none"):
        sampled(model, words, tmp_path, first_token="model")


def test_texts_begin_behind_what_the_tokenizer_puts_there(words: Any, tmp_path: Path) -> None:
    assert start_ids(words) == [BEGIN]
    words.bos_token = "[MASK]"  # which it has, and puts nowhere
    assert start_ids(words) == [END]
    assert start_ids(tiny_tokenizer(tmp_path / "bare")) == []
    assert special_ids(words) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "mistral", "qwen3", "opt"])
def test_other_architectures_write_too(model_type: str, words: Any, tmp_path: Path) -> None:
    model = tiny_causal_model(model_type, eos_token_id=END)
    texts = sampled(model, words, tmp_path, n_windows=2)
    for ids in texts.ids:
        assert set(ids) <= set(PLAIN)
        assert ids[1:5] == likeliest(model, ids[:4], set(PLAIN))[1:]
