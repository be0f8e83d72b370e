"""masked ≡ resized for every architecture and every way to shrink; swapping and copying leave the dense model alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.models import (
    BLOCK_TYPES,
    MODEL_TYPES,
    MODERN_TYPES,
    output_tensors,
    random_entries,
    random_level,
    tiny_inputs,
    tiny_model,
)
from ziplm_deploy.errors import UnsupportedModelError, UsageError
from ziplm_deploy.models.architectures import ARCHITECTURES
from ziplm_deploy.models.inspection import inspect_model
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import output_linear, prunable_modules
from ziplm_deploy.models.resizing import (
    build_replacement,
    dropped_as_is,
    first_structures,
    install,
    kept_structures,
    masked,
    random_resized,
    resize,
    shared_copy,
)

pytestmark = pytest.mark.transformers

PLANS = {
    "attention dropped": {"1.attention": 0},
    "ffn dropped": {"1.ffn": 0},
    "layer dropped": {"0.attention": 0, "0.ffn": 0},
    "uneven heads": {"0.attention": 3, "1.attention": 1, "2.attention": 2},
    "narrow": {"0.ffn": 1, "1.ffn": 17, "2.ffn": 63},
    "mixed": {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.attention": 4, "2.ffn": 64},
    "all dropped": {f"{layer}.{kind}": 0 for layer in range(3) for kind in ("attention", "ffn")},
}
BIASES = {  # of a head's query, key and value; rows, then biases of a column; new ones of a layer's outputs
    "modernbert": (0, 2, 0, 2),
    "eurobert": (0, 2, 0, 2),
}
STEPS = {  # sizes of one resize and of the next
    "heads": ({"0.attention": 3, "1.attention": 3, "2.attention": 2}, {"0.attention": 2, "1.attention": 3}),
    "columns": ({"0.ffn": 40, "1.ffn": 17}, {"0.ffn": 24, "1.ffn": 1, "2.ffn": 63}),
    "dropped later": ({"0.attention": 3, "1.ffn": 17}, {"0.attention": 0, "1.ffn": 0, "2.ffn": 0}),
    "dropped before": ({"0.attention": 0, "1.ffn": 0, "2.attention": 0, "2.ffn": 0}, {"0.ffn": 30, "1.attention": 2}),
    "only others": ({"0.attention": 2, "0.ffn": 8}, {"1.attention": 3, "2.ffn": 8}),
    "mixed": (PLANS["mixed"], {"0.ffn": 9, "2.attention": 3, "2.ffn": 11}),
}


def composed(first: dict[str, LevelWeights], second: dict[str, LevelWeights]) -> dict[str, LevelWeights]:
    """The levels of the dense model that ``first`` and then ``second`` amount to."""
    then = {
        name: dataclasses.replace(entry, kept=first[name].kept[entry.kept]) if name in first else entry
        for name, entry in second.items()
    }
    return first | then


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("sizes", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_masked_equals_resized(model_type: str, sizes: dict[str, int]) -> None:
    dense = tiny_model(model_type)
    inputs = tiny_inputs(dense)
    before = output_tensors(dense, inputs)
    entries = random_entries(dense, sizes)
    expected, found = output_tensors(masked(dense, entries), inputs), output_tensors(resize(dense, entries), inputs)
    assert largest_difference(expected, found) < 1e-5
    assert largest_difference(before, found) > 1e-3
    assert largest_difference(before, output_tensors(dense, inputs)) == 0.0


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_masked_equals_resized_for_any_plan(data: st.DataObject) -> None:
    dense = tiny_model(data.draw(st.sampled_from(MODEL_TYPES)))
    sizes = {
        module.name: data.draw(st.integers(0, module.structures))
        for module in prunable_modules(dense)
        if data.draw(st.booleans())
    }
    entries = random_entries(dense, sizes, seed=data.draw(st.integers(0, 1000)))
    inputs = tiny_inputs(dense)
    expected, found = output_tensors(masked(dense, entries), inputs), output_tensors(resize(dense, entries), inputs)
    assert largest_difference(expected, found) < 1e-5


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_resized_twice_equals_masked_once(model_type: str, steps: tuple[dict[str, int], dict[str, int]]) -> None:
    dense = tiny_model(model_type)
    inputs = tiny_inputs(dense)
    first = random_entries(dense, steps[0], seed=1)
    once = resize(dense, first)
    before, kept_before = output_tensors(once, inputs), kept_structures(once)
    second = random_entries(once, steps[1], seed=2)
    both = composed(first, second)
    twice = resize(once, second)
    assert largest_difference(output_tensors(masked(dense, both), inputs), output_tensors(twice, inputs)) < 1e-5
    assert kept_structures(twice) == kept_structures(dense) | {name: e.kept.tolist() for name, e in both.items()}
    assert {m.name: m.structures for m in prunable_modules(twice)} == {
        name: len(kept) for name, kept in kept_structures(twice).items()
    }
    assert not {p.data_ptr() for p in twice.parameters()} & {p.data_ptr() for p in once.parameters()}
    assert largest_difference(before, output_tensors(once, inputs)) == 0.0
    assert kept_structures(once) == kept_before


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_chain_of_resizes_equals_masked_once(data: st.DataObject) -> None:
    dense = tiny_model(data.draw(st.sampled_from(MODEL_TYPES)))
    model, entries = dense, dict[str, LevelWeights]()
    for step in range(3):
        sizes = {
            module.name: data.draw(st.integers(0, module.structures))
            for module in prunable_modules(model)
            if module.structures and data.draw(st.booleans())
        }
        level = random_entries(model, sizes, seed=data.draw(st.integers(0, 1000)) + step)
        model, entries = resize(model, level), composed(entries, level)
    inputs = tiny_inputs(dense)
    assert largest_difference(output_tensors(masked(dense, entries), inputs), output_tensors(model, inputs)) < 1e-5


def test_mpnet_keeps_its_place_in_the_position_bias_when_all_heads_left_are_kept() -> None:
    dense = tiny_model("mpnet")
    module = prunable_modules(dense)[0]
    for first in (torch.tensor([0, 1, 2]), torch.tensor([1, 3]), torch.tensor([3, 2, 1, 0])):
        entry = dataclasses.replace(random_level(dense, module, len(first)), kept=first)
        once = resize(dense, {"0.attention": entry})
        twice = random_resized(once, {"0.attention": len(first)})
        inputs = tiny_inputs(dense)
        assert largest_difference(output_tensors(once, inputs), output_tensors(twice, inputs)) == 0.0
        assert kept_structures(twice)["0.attention"] == first.tolist()


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_a_dropped_module_stays_dropped(model_type: str) -> None:
    dense = tiny_model(model_type)
    once = resize(dense, random_entries(dense, {"0.attention": 0, "1.ffn": 0}))
    modules = {module.name: module for module in prunable_modules(once)}
    assert [modules[name].structures for name in ("0.attention", "0.ffn", "1.ffn")] == [0, 64, 0]
    entries = {name: dropped_as_is(once, modules[name]) for name in ("0.attention", "1.ffn")}
    inputs = tiny_inputs(dense)
    expected = output_tensors(once, inputs)
    for again in (resize(once, entries), random_resized(once, {"0.attention": 0, "1.ffn": 0})):
        assert largest_difference(expected, output_tensors(again, inputs)) == 0.0
        assert kept_structures(again) == kept_structures(once)
    with pytest.raises(UnsupportedModelError, match=r"1\.ffn.*dropped"):
        random_resized(once, {"1.ffn": 3})
    for name, module in {module.name: module for module in prunable_modules(dense)}.items():
        if name in entries:
            with pytest.raises(UsageError, match=rf"{name}, which was dropped, found \[0, 1\].*size 0"):
                resize(once, {name: first_structures(dense, module, 2)})


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_resized_is_smaller_and_shares_nothing(model_type: str) -> None:
    dense = tiny_model(model_type)
    resized = resize(dense, random_entries(dense, PLANS["mixed"]))
    assert not {p.data_ptr() for p in resized.parameters()} & {p.data_ptr() for p in dense.parameters()}
    rows = inspect_model(resized)
    assert [(row["heads"], row["ffn_width"]) for row in rows] == [(0, 24), (1, 0), (4, 64)]
    dense_rows = inspect_model(dense)
    h = 32
    head_biases, column_rows, column_biases, new_biases = BIASES.get(model_type, (3, 1, 1, 0))
    # A head's, a column's weights and biases.
    saved_by_heads, saved_by_columns = 8 * (4 * h + head_biases), (1 + column_rows) * h + column_biases
    # A pre-LN model also loses the norm before a dropped module; ModernBERT has none before its first attention.
    norm = 0 if ARCHITECTURES[model_type].attention_norm is None else h if model_type in MODERN_TYPES else 2 * h
    norms = (0 if model_type == "modernbert" else 1, 1, 0)
    for row, full, heads, columns, lost in zip(rows, dense_rows, (4, 3, 0), (40, 64, 0), norms, strict=True):
        saved = heads * saved_by_heads + columns * saved_by_columns + lost * norm - new_biases * h
        assert row["parameters"] == full["parameters"] - saved


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_install_swaps_back_and_forth(model_type: str) -> None:
    dense = tiny_model(model_type)
    stitched = shared_copy(dense)
    assert {id(p) for p in stitched.parameters()} == {id(p) for p in dense.parameters()}
    inputs = tiny_inputs(dense)
    before = output_tensors(dense, inputs)
    for module in prunable_modules(dense):
        for size in (0, 1, module.structures - 1, 0):
            entry = random_level(dense, module, size)
            install(stitched, module.layer, build_replacement(dense, module, entry))
            expected = output_tensors(masked(dense, {module.name: entry}), inputs)
            assert largest_difference(expected, output_tensors(stitched, inputs)) < 1e-5
        whole = random_resized(dense, {module.name: module.structures})
        assert largest_difference(before, output_tensors(whole, inputs)) < 1e-6
        linear = output_linear(dense, module)
        full = dataclasses.replace(
            random_level(dense, module, module.structures),
            weight=linear.weight.detach(),
            bias=torch.zeros(32) if linear.bias is None else linear.bias.detach(),
        )
        install(stitched, module.layer, build_replacement(dense, module, full))
        assert largest_difference(before, output_tensors(stitched, inputs)) < 1e-6
    assert largest_difference(before, output_tensors(dense, inputs)) == 0.0


@pytest.mark.parametrize("model_type", BLOCK_TYPES)
def test_gradients_reach_every_parameter_of_a_resized_model(model_type: str) -> None:
    resized = resize(tiny_model(model_type), random_entries(tiny_model(model_type), PLANS["mixed"])).train()
    outputs = resized(**tiny_inputs(resized))
    outputs[0].square().sum().backward()
    silent = [name for name, p in resized.named_parameters() if p.grad is None]
    assert [name for name in silent if not name.endswith("mask_token")] == []  # only pre-training hides patches


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "electra"])
def test_optional_outputs_of_a_resized_model(model_type: str) -> None:
    resized = resize(tiny_model(model_type), random_entries(tiny_model(model_type), PLANS["layer dropped"]))
    with torch.no_grad():
        outputs = resized(**tiny_inputs(resized), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    attentions = [tuple(found.shape) for found in outputs.attentions if found is not None]  # of the layers that attend
    assert attentions == [(2, 4, 9, 9)] * 2


def test_kept_is_on_the_model_and_unsorted_indices_work() -> None:
    dense = tiny_model("mpnet")
    (module, *_) = prunable_modules(dense)
    entry = random_level(dense, module, 3)
    flipped = entry.kept.flip(0)
    reordered = dataclasses.replace(entry, kept=flipped)
    resized = resize(dense, {"0.attention": reordered})
    assert kept_structures(resized)["0.attention"] == flipped.tolist()
    assert kept_structures(resized)["2.ffn"] == list(range(64)) == kept_structures(dense)["2.ffn"]
    inputs = tiny_inputs(dense)
    expected = output_tensors(masked(dense, {"0.attention": reordered}), inputs)
    assert largest_difference(expected, output_tensors(resized, inputs)) < 1e-5


def test_vit_without_query_key_value_biases() -> None:
    dense = tiny_model("vit", qkv_bias=False)
    entries = random_entries(dense, PLANS["mixed"])
    inputs = tiny_inputs(dense)
    found = output_tensors(resize(dense, entries), inputs)
    assert largest_difference(output_tensors(masked(dense, entries), inputs), found) < 1e-5


def test_half_precision_stays() -> None:
    dense = tiny_model("bert").to(torch.bfloat16)
    resized = resize(dense, random_entries(dense, PLANS["uneven heads"]))
    assert {parameter.dtype for parameter in resized.parameters()} == {torch.bfloat16}


def test_output_linear_of_a_dropped_module_is_an_error() -> None:
    dense = tiny_model("distilbert")
    resized = resize(dense, random_entries(dense, {"0.attention": 0, "1.ffn": 3}))
    attention, _, _, ffn = prunable_modules(dense)[:4]
    with pytest.raises(UnsupportedModelError, match=r"0\.attention"):
        output_linear(resized, attention)
    assert isinstance(output_linear(resized, ffn), nn.Linear)
    assert output_linear(resized, ffn).in_features == 3


def test_bad_entries_are_refused() -> None:
    dense = tiny_model("bert")
    module = prunable_modules(dense)[0]
    entry = random_level(dense, module, 2)
    with pytest.raises(UsageError, match=r"found 7\.ffn"):
        resize(dense, {"7.ffn": entry})
    with pytest.raises(UsageError, match=r"found 0\.fnn"):
        random_resized(dense, {"0.fnn": 3})
    with pytest.raises(UsageError, match=r"distinct structures in 0\.\.3"):
        resize(dense, {"0.attention": dataclasses.replace(entry, kept=torch.tensor([1, 4]))})
    shrunk = resize(dense, {"0.attention": entry})  # a module cannot grow again
    with pytest.raises(UsageError, match=r"distinct structures in 0\.\.1"):
        resize(shrunk, {"0.attention": random_level(dense, module, 3)})
    with pytest.raises(UsageError, match="distinct structures"):
        masked(dense, {"0.attention": dataclasses.replace(entry, kept=torch.tensor([1, 1]))})
    with pytest.raises(UsageError, match=r"expected weight \(32, 2\)"):
        resize(dense, {"0.ffn": entry})
    narrow = dataclasses.replace(entry, weight=entry.weight[:16], bias=entry.bias[:16])
    with pytest.raises(UsageError, match="another model"):
        resize(dense, {"0.attention": narrow})
