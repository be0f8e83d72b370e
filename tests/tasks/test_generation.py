"""Causal language modelling: windows, perplexity against torch's own loss, features, bad input."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import WORDS, tiny_causal_model, tiny_tokenizer
from tests.helpers.pipeline import causal_recipe, raw_recipe
from ziplm_deploy.errors import DataError, RecipeError
from ziplm_deploy.recipe import DataConfig, parse_recipe
from ziplm_deploy.stages.checks import check_task
from ziplm_deploy.tasks import EvaluationSet, get_task, torch_function
from ziplm_deploy.tasks.generation import _windows

TASK = get_task("text-generation")


def text(count: int) -> str:
    return " ".join(WORDS[(7 * index + index // 3) % len(WORDS)] for index in range(count))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows_of(folder: Path, content: str, processor: Any, name: str = "text.txt", **fields: Any) -> list[dict[str, Any]]:
    """Settled evaluation rows of a file."""
    path = folder / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    data = DataConfig.model_validate({"evaluation": str(path), **fields})
    return TASK.settle_rows(TASK.load_rows(data, "evaluation", 0), data, "evaluation", 0, processor)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.integers(1, 40), st.integers(2, 200))
def test_every_token_is_scored_once_by_windows_of_one_length(context: int, stride: int, n: int) -> None:
    stream = list(range(n))
    windows = _windows(stream, context, min(stride, context))
    scored = [token for row in windows for token in row["input_ids"][max(1, row["scored_from"]) :]]
    assert len(scored) == len(set(scored))
    assert scored == sorted(scored)
    if stride < context <= n:  # no token starts a window of its own
        assert scored == list(range(1, scored[-1] + 1))
        assert n - 1 - scored[-1] < stride
    assert {len(row["input_ids"]) for row in windows} == {min(context, n)}


def test_perplexity_is_that_of_the_models_own_loss(tmp_path: Path, processor: Any) -> None:
    model = tiny_causal_model("llama")
    rows = rows_of(tmp_path, text(100), processor, context=20)
    assert [len(row["input_ids"]) for row in rows] == [20] * 5
    found = TASK.evaluate(torch_function(TASK, model), EvaluationSet(rows, processor, 20, batch_size=2))
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert found["inverse_perplexity"] == pytest.approx(math.exp(-loss), rel=1e-5)
    assert next(iter(found)) == "inverse_perplexity"


def test_strided_windows_score_each_token_with_the_context_before_it(tmp_path: Path, processor: Any) -> None:
    model = tiny_causal_model("gpt2")
    rows = rows_of(tmp_path, text(30), processor, context=12, stride=6)
    outcomes = TASK.outcomes(torch_function(TASK, model), EvaluationSet(rows, processor, 12))
    assert outcomes["scored"].tolist() == [11, 6, 6, 6]
    stream = rows_of(tmp_path, text(30), processor, context=30)[0]["input_ids"]
    with torch.no_grad():
        second = model(input_ids=torch.tensor([stream[6:18]])).logits[0].log_softmax(-1)
    expected = sum(float(second[position - 1, stream[6 + position]]) for position in range(6, 12))
    assert outcomes["log_likelihood"][1] == pytest.approx(expected, abs=1e-4)


def test_training_loss_is_the_models_own(tmp_path: Path, processor: Any) -> None:
    model = tiny_causal_model("qwen2")
    rows = rows_of(tmp_path, text(40), processor, context=10)
    batch = TASK.collate(TASK.examples(rows, processor, 10), processor)
    with torch.no_grad():
        outputs = TASK.forward(model, batch)
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert float(TASK.task_loss(outputs, batch)) == pytest.approx(float(loss), rel=1e-5)


def test_features_are_logits_of_tokens_that_are_no_padding(processor: Any) -> None:
    model = tiny_causal_model("llama")
    rows = [{"input_ids": list(range(5, 15)), "scored_from": 0}, {"input_ids": [5, 6, 7], "scored_from": 0}]
    (batch,) = TASK.encode(EvaluationSet(rows, processor, 40))
    features = TASK.features(TASK.forward(model, batch), batch)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 1:] for row in sorted(rows, key=len)]
    lengths = batch["attention_mask"].sum(1).tolist()
    expected = torch.cat(sorted(alone, key=lambda each: lengths.index(1 + len(each))))
    assert torch.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "mistral"])
def test_what_the_search_compares_is_computed_where_it_is_wanted(model_type: str, processor: Any) -> None:
    model = tiny_causal_model(model_type)
    rows = [{"input_ids": list(range(5, 35)), "scored_from": 0}, {"input_ids": [5, 6, 7], "scored_from": 0}]
    (batch,) = TASK.encode(EvaluationSet(rows, processor, 40))
    with torch.no_grad():
        expected = TASK.features(TASK.forward(model, batch), batch)
        assert torch.allclose(TASK.compared(model, batch), expected, atol=1e-5)
        whole = TASK.distilled(TASK.forward(model, batch), batch)
    assert len(expected) == 16 + 2  # not of the first token of a window
    assert len(whole) == 30 + 3


def test_windows_of_the_search_are_the_beginnings_of_others() -> None:
    rows = [{"input_ids": list(range(9)), "scored_from": 2}, {"input_ids": [1, 2], "scored_from": 0}]
    cut = TASK.shortened(rows, 4)
    assert [row["input_ids"] for row in cut] == [[0, 1, 2, 3], [1, 2]]
    assert TASK.shortened(rows, None) == rows


def test_the_dense_model_agrees_with_itself(tmp_path: Path, processor: Any) -> None:
    function = torch_function(TASK, tiny_causal_model("llama"))
    other = torch_function(TASK, tiny_causal_model("llama", seed=5))
    data = EvaluationSet(rows_of(tmp_path, text(60), processor, context=20), processor, 20)
    assert TASK.fidelity(function, function, data, data) == pytest.approx(
        {"next_token_agreement": 1.0, "divergence": 0.0}, abs=1e-9
    )
    differing = TASK.fidelity(other, function, data, data)
    assert differing["divergence"] > 0.01
    assert differing["next_token_agreement"] < 1.0


def test_outcomes_and_fidelity_take_one_pass_of_the_model(tmp_path: Path, processor: Any) -> None:
    dense = torch_function(TASK, tiny_causal_model("llama"))
    other = torch_function(TASK, tiny_causal_model("llama", seed=5))
    data = EvaluationSet(rows_of(tmp_path, text(60), processor, context=20), processor, 20, batch_size=2)
    calls = 0

    def counted(inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return other(inputs)

    outcomes, fidelity = TASK.outcomes_and_fidelity(counted, dense, data, data)
    assert calls == -(-len(data.rows) // 2)
    assert fidelity == TASK.fidelity(other, dense, data, data)
    expected = TASK.outcomes(other, data)
    for name in ("scored", "right", "log_likelihood"):
        np.testing.assert_array_equal(outcomes[name], expected[name])


def test_plain_text_keeps_its_line_breaks_and_blank_lines(tmp_path: Path, processor: Any) -> None:
    data = DataConfig(evaluation=str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text(" = Title = \n\n the cat\n", encoding="utf-8")
    assert TASK.load_rows(data, "evaluation", 0) == [{"text": " = Title = \n\n the cat\n"}]
    packed = rows_of(tmp_path, text(50), processor, name="b.txt.gz", context=16)
    assert packed == rows_of(tmp_path, text(50), processor, context=16)


def test_documents_are_joined_by_the_end_of_text(tmp_path: Path, processor: Any) -> None:
    lines = "".join(json.dumps({"text": each}) + "\n" for each in ("the cat", "a dog"))
    processor.eos_token = "[SEP]"
    (row,) = rows_of(tmp_path, lines, processor, name="c.jsonl", context=64)
    words = processor.convert_ids_to_tokens(row["input_ids"])
    assert sorted(words) == sorted(["the", "cat", "[SEP]", "a", "dog"])
    assert words[2] == "[SEP]"


def test_calibration_windows_are_drawn_and_evaluation_takes_the_first(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "d.txt").write_text(text(200), encoding="utf-8")
    path = str(tmp_path / "d.txt")
    data = DataConfig(calibration=path, evaluation=path, context=10, n_calibration=8, n_evaluation=3)
    documents = TASK.load_rows(data, "calibration", 0)
    every = TASK.settle_rows(documents, data.model_copy(update={"n_evaluation": None}), "evaluation", 0, processor)
    assert TASK.settle_rows(documents, data, "evaluation", 0, processor) == every[:3]
    drawn = TASK.settle_rows(documents, data, "calibration", 0, processor)
    assert len(drawn) == 8
    assert all(row in every for row in drawn)
    assert drawn != every[:8]


def test_conversations_go_through_the_chat_template(tmp_path: Path, processor: Any) -> None:
    lines = json.dumps({"messages": [{"role": "user", "content": "the cat sat"}]}) + "\n"
    processor.chat_template = "{% for m in messages %}{{ m.content }} .{% endfor %}"
    (row,) = rows_of(tmp_path, lines, processor, name="e.jsonl")
    assert processor.convert_ids_to_tokens(row["input_ids"]) == ["the", "cat", "sat", "."]
    processor.chat_template = None
    with pytest.raises(DataError, match="chat template"):
        rows_of(tmp_path, lines, processor, name="e.jsonl")


def test_too_little_text_is_named(tmp_path: Path, processor: Any) -> None:
    with pytest.raises(DataError, match="only blanks"):
        rows_of(tmp_path, " \n \n", processor)
    with pytest.raises(DataError, match="at least 2 tokens"):
        rows_of(tmp_path, "cat", processor)
    with pytest.raises(DataError, match=r"at least 9 examples for data.n_evaluation, found 2"):
        rows_of(tmp_path, text(20), processor, context=10, n_evaluation=9)


def test_resampled_windows_weigh_by_their_tokens() -> None:
    from ziplm_deploy.tasks.generation import inverse_perplexity
    from ziplm_deploy.tasks.outcomes import Outcomes

    outcomes = Outcomes({"scored": np.array([1, 3]), "log_likelihood": np.array([-1.0, -6.0])})
    found = inverse_perplexity(outcomes, np.array([[1.0, 1.0], [2.0, 0.0]]))
    assert found.tolist() == pytest.approx([math.exp(-7 / 4), math.exp(-1)])


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("environment", {"engine": "openvino"}),
        ("environment", {"engine": "deepsparse"}),
        ("export", {"shapes": "static"}),
        ("dense", {"train": True}),
        ("compress", {"variants": ["int8", "sparse"]}),
        ("compress", {"int8": {"method": "static"}, "variants": ["int8"]}),
        ("benchmark", {"baselines": ["torch", "openvino-int8"]}),
    ],
)
def test_what_is_made_for_encoders_only_is_refused_by_name(
    tmp_path: Path, section: str, fields: dict[str, Any]
) -> None:
    raw = causal_recipe(tmp_path, **{section: fields})
    with pytest.raises(RecipeError, match=f"expected {section}.{next(iter(fields))}.* for text-generation"):
        check_task(parse_recipe(raw))


@pytest.mark.parametrize(
    ("section", "fields", "said"),
    [
        ("data", {"context": 64}, r"expected no data\.context"),
        ("data", {"stride": 64}, r"expected no data\.stride"),
        ("prune", {"search": {"context": 16}}, r"expected no prune\.search\.context"),
        ("profile", {"stack_megabytes": 10}, r"expected no profile\.stack_megabytes"),
    ],
)
def test_what_is_said_of_windows_of_text_is_refused_for_encoders(
    tmp_path: Path, section: str, fields: dict[str, Any], said: str
) -> None:
    raw = raw_recipe(tmp_path)
    raw[section] = {**raw.get(section, {}), **fields}
    with pytest.raises(RecipeError, match=said):
        check_task(parse_recipe(raw))


@pytest.mark.parametrize("fields", [{"mixed": True}, {"weight_only_4": ["*"]}, {"fallback": "weight-only-8"}])
def test_forms_of_linears_need_a_file_that_has_them(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"expected int8 among compress\.variants for compress\.int8"):
        check_task(parse_recipe(causal_recipe(tmp_path, compress={"int8": fields})))


def test_text_is_known_again_wherever_windows_begin() -> None:
    stream = np.random.default_rng(0).integers(0, 50_000, 2000).tolist()

    def windows(ids: list[int], size: int) -> list[dict[str, Any]]:
        return [{"input_ids": ids[i : i + size], "scored_from": 0} for i in range(0, len(ids) - size + 1, size)]

    own = windows(stream, 200)
    assert TASK.shared(own, windows(stream[77:], 333)) == (9, 10), "the last is cut off there"
    assert TASK.shared(own, windows(stream[1000:], 100)) == (5, 10)
    assert TASK.shared(own, windows(stream[::-1], 200)) == (0, 10)
    short = windows(stream, 16)
    assert TASK.shared(short, windows(stream[5:], 100))[0] > 100, "windows shorter than a span"
    assert TASK.shared(own, []) == (0, 10)


def test_torch_is_a_baseline_of_onnx_files_alone(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"benchmark": {"baselines": ["torch"]}}
    check_task(parse_recipe(causal_recipe(tmp_path, **asked)))
    in_llama_cpp = {"environment": {"engine": "llamacpp", "workload": {"prefill": 12, "decode": 4}}}
    raw = causal_recipe(tmp_path, **asked, **in_llama_cpp, export={"gguf": "F16"})
    with pytest.raises(RecipeError, match=r"expected benchmark\.baselines among \[\] for text-generation, found torch"):
        check_task(parse_recipe(raw))


def test_workload_and_task_belong_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="prefill: tokens, decode: tokens"):
        parse_recipe(causal_recipe(tmp_path) | {"environment": {"workload": {"seq_len": 32}}})
    with pytest.raises(RecipeError, match="found prefill and decode, which only text-generation has"):
        parse_recipe(raw_recipe(tmp_path) | {"environment": {"workload": {"prefill": 8, "decode": 4}}})
