"""Smoothed inputs: the same function, columns of one size, INT8 that massive activations no longer ruin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.helpers.models import random_entries, tiny_causal_model
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.smoothing import (
    STRENGTHS,
    choose_strengths,
    column_maxima,
    smooth,
    smooth_as_chosen,
    smoothing_sites,
    unsmooth,
)
from ziplm_deploy.models.resizing import resize
from ziplm_deploy.recipe import Int8Config

pytestmark = pytest.mark.transformers

SETTINGS = Int8Settings(Int8Config(), "onnxruntime", reduce_range=True)
KINDS = {
    "llama": {"ffn", "attention", "norms"},
    "qwen2": {"ffn", "attention", "norms"},
    "qwen3": {"ffn", "attention", "norms"},
    "mistral": {"ffn", "attention", "norms"},
    "opt": {"ffn", "attention", "norms"},  # ReLU lets a factor through
    "gpt2": {"norms"},
    "gpt_neox": {"norms"},
}
SIZES = {"0.attention": 1, "0.ffn": 24, "1.attention": 0, "2.ffn": 0}


def batches(model: Any) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model(**batch).logits[batch["attention_mask"].bool()] for batch in batches(model)])


@pytest.mark.parametrize("strength", [0.0, *STRENGTHS, 1.0])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_smoothed_model_computes_the_same(model_type: str, strength: float) -> None:
    dense = tiny_causal_model(model_type)
    for model in (dense, resize(dense, random_entries(dense, SIZES))):
        sites, before = smoothing_sites(model), logits(model)
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scales = smooth(model, sites, column_maxima(model, batches(model), sites), strength)
        assert any(not torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        unsmooth(model, sites, scales)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, own[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "kinds"), KINDS.items())
def test_every_block_has_its_sites(model_type: str, kinds: set[str]) -> None:
    dense = tiny_causal_model(model_type)
    counts = {kind: sum(site.kind == kind for site in smoothing_sites(dense)) for kind in kinds}
    assert {site.kind for site in smoothing_sites(dense)} == kinds
    assert counts == {kind: 6 if kind == "norms" else 3 for kind in kinds}
    pruned = smoothing_sites(resize(dense, random_entries(dense, SIZES)))
    left = {"norms": 4, "ffn": 2, "attention": 2}
    assert {kind: sum(site.kind == kind for site in pruned) for kind in kinds} == {kind: left[kind] for kind in kinds}


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_full_strength_makes_all_columns_alike(model_type: str) -> None:
    model = tiny_causal_model(model_type)
    sites = [site for site in smoothing_sites(model) if site.kind != "attention"]
    smooth(model, sites, column_maxima(model, batches(model), sites), 1.0)
    for found in column_maxima(model, batches(model), sites).values():
        largest = found.max()
        assert (found <= largest * (1 + 1e-4)).all()
        alike = torch.isclose(found, largest, atol=0, rtol=1e-4)
        assert alike.float().mean() > 0.5, "all but those below the floor"


def test_query_heads_of_a_group_share_the_scale_of_their_value() -> None:
    model = tiny_causal_model("llama")
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    (site,) = [site for site in smoothing_sites(model) if site.kind == "attention" and ".0." in site.source]
    maxima = column_maxima(model, batches(model), [site])[site.readers[0]]
    width = maxima.numel() // model.config.num_attention_heads
    before = model.get_submodule(site.readers[0]).weight.detach().clone()
    (scale,) = smooth(model, [site], {site.readers[0]: maxima}, 1.0)
    factors = (model.get_submodule(site.readers[0]).weight.detach() / before).median(0).values.reshape(-1, width)
    copies = model.config.num_attention_heads // model.config.num_key_value_heads
    expected = scale.reshape(-1, 1, width).expand(-1, copies, -1).reshape(-1, width)
    torch.testing.assert_close(factors, expected, atol=1e-5, rtol=1e-4)


def massive(model_type: str = "llama") -> Any:
    """A model whose second FFN has one column a thousand times the others, which its weights take back."""
    model = tiny_causal_model(model_type)
    block = model.model.layers[1].mlp
    with torch.no_grad():
        block.up_proj.weight[3] *= 1000
        block.down_proj.weight[:, 3] /= 1000
    return model


def test_massive_columns_no_longer_ruin_int8() -> None:
    model, expected = massive(), logits(massive())

    def divergence(candidate: Any) -> float:
        return float((logits(candidate) - expected).square().mean())

    from ziplm_deploy.compression.int8 import smoothing

    before = smoothing._in_int8(model, batches(model), divergence, SETTINGS)
    strengths = choose_strengths(model, batches(model), batches(model), divergence, SETTINGS)
    assert "ffn" in strengths
    assert smoothing._in_int8(model, batches(model), divergence, SETTINGS) < before / 5
    again = massive()
    smooth_as_chosen(again, batches(again), strengths)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-6, rtol=1e-4)


def test_a_copy_is_smoothed_as_the_model_was_that_chose() -> None:
    """Scales of norms look at weights that other scales have changed."""
    model, copied = massive(), massive()
    values = iter([9.0, 8.0, 7.0, 7.5, 6.0, 5.0, 5.5, 4.0, 3.0, 3.5])
    chosen = choose_strengths(model, batches(model), batches(model), lambda candidate: next(values), SETTINGS)
    assert chosen == {"ffn": 0.7, "attention": 0.7, "norms": 0.7}
    smooth_as_chosen(copied, batches(copied), chosen)
    for name, tensor in copied.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-6, rtol=1e-4)


def test_linears_that_do_not_become_int8_have_no_part_in_the_choice() -> None:
    model = massive()
    down = [site.readers[0] for site in smoothing_sites(model) if site.kind == "ffn"]
    values = iter(range(100, 0, -1))
    found = choose_strengths(
        model, batches(model), batches(model), lambda candidate: next(values), SETTINGS, leave_out=down
    )
    assert set(found) == {"attention", "norms"}


def test_nothing_is_smoothed_where_nothing_helps() -> None:
    model = tiny_causal_model("llama")
    own = copy.deepcopy(model.state_dict())
    assert choose_strengths(model, batches(model), batches(model), lambda candidate: 1.0, SETTINGS) == {}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, own[name], atol=1e-6, rtol=1e-5)
