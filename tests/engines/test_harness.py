"""Members in lm-evaluation-harness: likelihoods of the torch model, a whole task of local data, bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from exporters import DecoderExportSettings, export_decoder
from tests.helpers.models import random_entries, tiny_causal_model, tiny_tokenizer
from ziplm_deploy import load_harness_model
from ziplm_deploy.errors import UsageError
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.resizing import resize

WINDOW = 16


@pytest.fixture(scope="module")
def model() -> Any:
    dense = tiny_causal_model("llama", hidden_size=64, eos_token_id=3, bos_token_id=2)
    return resize(dense, random_entries(dense, {"0.attention": 1, "2.ffn": 0})).eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("member")
    tiny_tokenizer(path / "words").save_pretrained(path)
    model.config.to_json_file(path / "config.json")
    export_decoder(causal_parts(model), path / "model.onnx", DecoderExportSettings(max_length=WINDOW))
    return path


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def torch_likelihood(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    row = [*context, *continuation][-(WINDOW + 1) :]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)
    targets = torch.tensor(row[-len(continuation) :])
    chosen = logits[-len(continuation) :]
    return float(chosen.gather(1, targets[:, None]).sum()), bool((chosen.argmax(-1) == targets).all())


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ziplm_deploy.engines.harness_model", raising=False)
    with pytest.raises(UsageError, match=r'pip install "ziplm-deploy\[lm-eval\]"'):
        load_harness_model(tmp_path)


def test_likelihoods_are_those_of_the_torch_model(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from ziplm_deploy.engines import harness_model

    monkeypatch.setattr(harness_model, "TOKENS_AT_ONCE", 20)  # several calls
    harness = load_harness_model(folder)
    pairs = [("the cat sat", " on the mat"), ("", "a dog ran"), ("who ran under a tree ?", " the cat")]
    pairs.append(("the cat sat on the mat under the tree a dog ran on the mat the", " dog sat"))  # beyond the window
    found = harness.loglikelihood(requests(*pairs))
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        before = harness.tok_encode(context) or [harness.prefix_token_id]
        expected = torch_likelihood(model, before, harness.tok_encode(continuation))
        assert value == pytest.approx(expected[0], abs=1e-3)
        assert greedy is expected[1]


def test_whole_texts_count_every_token_once(folder: Path, model: Any) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    harness = load_harness_model(folder)
    text = " ".join(["the cat sat on the mat . a dog ran under a tree ?"] * 3)
    ids = harness.tok_encode(text)
    assert len(ids) > 2 * WINDOW
    (found,) = harness.loglikelihood_rolling(requests((text,)))
    expected, known = 0.0, [harness.prefix_token_id, *ids]
    for first in range(0, len(ids), WINDOW):
        end = min(first + WINDOW, len(ids))
        start = max(0, end - WINDOW)
        expected += torch_likelihood(model, known[start : first + 1], known[first + 1 : end + 1])[0]
    assert found == pytest.approx(expected, abs=1e-2)


def test_a_task_of_local_data_is_evaluated(folder: Path, model: Any, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": "the cat sat on the", "choices": ["mat", "dog"], "answer": 0},
        {"question": "a dog ran under a", "choices": ["tree", "cat"], "answer": 1},
        {"question": "who sat on the", "choices": ["mat", "?"], "answer": 1},
    ]
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
    )
    harness = load_harness_model(folder)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=harness, tasks=["tiny_choice"], task_manager=tasks, bootstrap_iters=0)
    right = 0
    for row in rows:
        context = harness.tok_encode(str(row["question"]))
        values = [torch_likelihood(model, context, harness.tok_encode(choice))[0] for choice in row["choices"]]  # type: ignore[attr-defined]
        right += int(values.index(max(values)) == row["answer"])
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(rows))


def test_texts_are_continued_and_end_where_a_task_says(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    harness = load_harness_model(folder)
    greedy = {"until": [], "max_gen_toks": 4}
    prompts = ["the cat", "a dog ran", "who sat on", "under the tree", "mat ."]
    texts = harness.generate_until(requests(*((prompt, greedy) for prompt in prompts)))
    assert texts == [harness.generator.continue_tokens([harness.tok_encode(prompt)], 4)[0] for prompt in prompts]
    prompt, whole = max(zip(prompts, texts, strict=True), key=lambda pair: len(pair[1]))
    stop = whole.split()[-1]
    (cut,) = harness.generate_until(requests((prompt, {**greedy, "until": [stop]})))
    assert stop not in cut
    assert whole.startswith(cut)
    long = " ".join(["the cat sat on mat"] * 5)  # loses its beginning, and nothing is put around the rest
    tail = harness.tok_encode(long)[-(WINDOW - 4) :]
    assert harness.tok_encode(long, add_special_tokens=True) != harness.tok_encode(long)
    assert harness.generate_until(requests((long, greedy))) == harness.generator.continue_tokens([tail], 4)
    with pytest.raises(UsageError, match="max_gen_toks below the window of 16"):
        harness.generate_until(requests(("the cat", {"max_gen_toks": 16})))


def test_texts_have_the_start_token_of_their_tokenizer(folder: Path, tmp_path: Path) -> None:
    """As the harness gives it to models of transformers, and once."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    shutil.copytree(folder, tmp_path / "starts")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = tokenizer.id_to_token(2)
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 2)])
    tokenizer.save(str(tmp_path / "starts" / "tokenizer.json"))
    plain, starts = load_harness_model(folder), load_harness_model(tmp_path / "starts")
    words = plain.tok_encode("the cat")
    assert starts.tok_encode("the cat") == [2, *words]
    assert starts.tok_encode(f"{start} the cat") == [2, *words]
    assert starts.tok_encode("the cat", add_special_tokens=False) == words
    (pair,) = [starts._encode_pair("the cat", " sat")]
    assert pair == ([2, *words], plain.tok_encode("sat"))
