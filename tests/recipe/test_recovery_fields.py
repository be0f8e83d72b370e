"""Sampled text and adapters in recipes: what is accepted, and what is refused for which reason."""

from __future__ import annotations

from typing import Any

import pytest

from ziplm_deploy.errors import RecipeError
from ziplm_deploy.recipe import parse_recipe, recipe_reference

CAUSAL: dict[str, Any] = {
    "name": "demo",
    "model": {"path": "m", "task": "text-generation"},
    "environment": {"workload": {"prefill": 8, "decode": 4}},
    "speedups": [2],
}
ENCODER = {"name": "demo", "model": {"path": "m", "task": "fill-mask"}, "speedups": [2]}
ADAPTERS = {"recover": {"mode": "one-shot", "lora": {}}}


def test_defaults_are_those_of_the_papers_and_absent_sections_leave_no_trace() -> None:
    recipe = parse_recipe({**CAUSAL, **ADAPTERS, "data": {"generated": {}}})
    assert recipe.recover.lora is not None
    assert (recipe.recover.lora.rank, recipe.recover.lora.alpha) == (8, 16.0)
    assert recipe.data.generated is not None
    assert (recipe.data.generated.first_token, recipe.data.generated.greedy_tokens) == ("vocabulary", 4)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    bare = parse_recipe(CAUSAL).model_dump(mode="json")
    assert "generated" not in bare["data"]
    assert "lora" not in bare["recover"]


@pytest.mark.parametrize(
    ("raw", "examples"),
    [
        (CAUSAL, 4),
        ({**CAUSAL, "recover": {"mode": "one-shot"}}, 4),
        ({**CAUSAL, "recover": {"mode": "one-shot", "batch_size": 32}}, 32),
        (ENCODER, 32),
    ],
)
def test_a_step_has_few_windows_of_text(raw: dict[str, Any], examples: int) -> None:
    """Each of their tokens has logits of the whole vocabulary."""
    assert parse_recipe(raw).recover.batch_size == examples


def test_sampled_text_stands_for_what_is_not_given() -> None:
    for given, stands_for in (({}, {"calibration", "train"}), ({"train": "t.txt"}, {"calibration"})):
        data = parse_recipe({**CAUSAL, "data": {"generated": {}, **given}}).data
        assert {which for which in ("calibration", "evaluation", "train") if data.is_generated(which)} == stands_for
    data = parse_recipe({**CAUSAL, **ADAPTERS, "data": {"generated": {}, "calibration": "c.txt"}}).data
    assert [data.is_generated(which) for which in ("calibration", "train")] == [False, True]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**ENCODER, "data": {"generated": {}}}, "found fill-mask, whose models write no text"),
        ({**CAUSAL, "data": {"generated": {"n_windows": 0}}}, "data.generated.n_windows: .* greater than or equal"),
        ({**CAUSAL, "data": {"generated": {"n": 4}}}, "data.generated.n: unknown field; valid here: batch_size, first"),
        ({**CAUSAL, "data": {"generated": {"temperature": 0}}}, "data.generated.temperature: .* greater than 0"),
        ({**CAUSAL, "data": {"generated": {"n_windows": 64}, "n_calibration": 65}}, "up to the 64 windows .* found 65"),
        ({**CAUSAL, "data": {"generated": {}, "n_train": 600}}, "n_train up to the 512 windows .* found 600"),
        ({**CAUSAL, "data": {"generated": {}, "calibration": "a", "train": "b"}}, "found both of them"),
        ({**CAUSAL, "data": {"generated": {}, "calibration": "a"}}, "nothing would read the sampled text"),
        ({**ENCODER, "recover": {"lora": {"rank": 0}}}, "recover.lora.rank: .* greater than or equal to 1"),
        ({**ENCODER, "recover": {"lora": {"r": 8}}}, "recover.lora.r: unknown field; valid here: alpha, rank"),
        ({**ENCODER, "recover": {"lora": {}, "freeze_embeddings": False}}, "nothing else, found false"),
        (
            {**ENCODER, **ADAPTERS, "compress": {"variants": ["sparse"], "train": {"mode": "distil"}}},
            "compress.train.mode: none with recover.lora, found distil: adapters would fill the zeros",
        ),
        (
            {
                **ENCODER,
                **ADAPTERS,
                "compress": {"variants": ["int8"], "int8": {"method": "qat"}, "train": {"mode": "distil"}},
            },
            "INT8's scales are trained with all weights",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


def test_the_reference_tells_of_sections_that_may_be_left_out() -> None:
    names = [line.split("`")[1] for line in recipe_reference().splitlines()[2:]]
    assert {"data.generated", "data.generated.n_windows", "recover.lora", "recover.lora.rank"} <= set(names)
