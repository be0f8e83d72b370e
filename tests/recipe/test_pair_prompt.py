"""Prompts of causal rerankers: places, texts, chat templates, and recipes that name none."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.helpers.reranker_models import PREFIX, SUFFIX, TASK
from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe import parse_recipe
from ziplm_deploy.recipe.pair_prompt import PairPrompt


def rendered(prompt: PairPrompt, query: str, document: str, instruction: str | None = None) -> str:
    """What the chat template gives, in the environment that transformers renders in."""
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    messages += [] if instruction is None else [{"role": "system", "content": instruction}]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(prompt.chat_template()).render(messages=messages)


def test_the_named_prompt_is_that_of_the_model_card() -> None:
    prompt = PairPrompt.parse("qwen3-reranker")
    expected = f"{PREFIX}<Instruct>: {TASK}\n<Query>: q\n<Document>: d{SUFFIX}"
    assert prompt.text("q", "d") == rendered(prompt, "q", "d") == expected
    assert prompt.tail == SUFFIX
    assert rendered(prompt, "q", "d", "sort") == expected.replace(TASK, "sort")


@pytest.mark.parametrize(
    "text",
    [
        "{query}{document}",
        'say "it" \\ {{ {query} }} {% if %}\n\n {document} \t\u00e9\U0001f600 {# #}\n',
        "{instruction} {query} {query} {document}",
    ],
)
def test_texts_and_chat_templates_say_the_same(text: str) -> None:
    prompt = PairPrompt.parse(text, "sort {query}")
    query, document = "who {document} {{ 1 }}?\n", "{query} {% raw %}"
    found = prompt.text(query, document)
    assert found == rendered(prompt, query, document)
    assert found.endswith(document + prompt.tail)


def recipe(**model: Any) -> Any:
    raw = {"name": "a", "speedups": [2], "environment": {"workload": {"seq_len": 32}}}
    return parse_recipe({**raw, "model": {"path": "m", "task": "reranking", **model}}, source="test").model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"pair_prompt": "qwen3"}, "{query} and then, once and last, {document}.*found none"),
        ({"pair_prompt": "{document} {query}"}, "found {document}, {query}"),
        ({"pair_prompt": "{query} {document} {document}"}, "once and last"),
        ({"pair_prompt": "{document}"}, "found {document};"),
        ({"pair_prompt": "{query} {document}", "instruction": "sort"}, "pair_prompt with {instruction}"),
        ({"pair_prompt": "", "instruction": "sort"}, "pair_prompt with {instruction}"),
        ({"answer_tokens": [True, False]}, "YAML reads yes and no without quotes"),
        ({"answer_tokens": []}, "answer_tokens"),
        ({"answer_tokens": ["a", "b", "c"]}, "answer_tokens"),
        ({"instruction": ""}, "instruction"),
        ({"task": "text-regression", "pair_prompt": "{query} {document}"}, "task reranking for pair_prompt"),
        ({"task": "sentence-similarity", "answer_tokens": ["a"]}, "task reranking for answer_tokens"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(model: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("{", r"\{")):
        recipe(**model)


def test_keys_change_with_the_prompt_alone() -> None:
    plain = recipe().fingerprint
    assert not {"pair_prompt", "instruction", "answer_tokens"} & set(plain)
    for model in ({"pair_prompt": ""}, {"instruction": "sort"}, {"answer_tokens": ["a"]}):
        assert recipe(**model).fingerprint != plain
