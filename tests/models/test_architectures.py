"""Every supported architecture is described rightly; everything else is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.models import HERE, MODEL_TYPES, tiny_config, tiny_inputs, tiny_model
from tests.helpers.towers import TOWER_TYPES
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import ARCHITECTURES, CHOICES, architecture_of
from ziplm_deploy.models.inspection import inspect_model, layer_rows
from ziplm_deploy.models.modules import layers_of, model_shape, output_linear, prunable_modules

pytestmark = pytest.mark.transformers


def test_supported_is_what_the_tests_cover() -> None:
    """T5 in test_relative.py, towers in test_towers.py, causal language models in test_causal_models.py."""
    encoders = [name for name, entry in ARCHITECTURES.items() if entry.causal is None]
    assert sorted(encoders) == sorted({*MODEL_TYPES, *HERE, *TOWER_TYPES, "t5"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shape_and_modules(model_type: str) -> None:
    model = tiny_model(model_type)
    shape = model_shape(model.config)
    assert (shape.n_layers, shape.hidden_size, shape.n_heads, shape.head_dim, shape.intermediate_size) == (
        3,
        32,
        4,
        8,
        64,
    )
    modules = prunable_modules(model)
    assert [module.name for module in modules[:4]] == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    assert len(modules) == 6
    for module in modules:
        assert output_linear(model, module).weight.shape == (32, module.structures * module.group_size)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_output_linear_feeds_the_residual_stream(model_type: str) -> None:
    """Zeroing the right linear must change the outputs; and each module has a linear of its own."""
    model = tiny_model(model_type)
    linears = [output_linear(model, module) for module in prunable_modules(model)]
    assert len({id(linear) for linear in linears}) == 6
    called: list[nn.Module] = []
    for linear in linears:
        linear.register_forward_pre_hook(lambda module, _: called.append(module))
    with torch.no_grad():
        model(**tiny_inputs(model))
    assert [id(module) for module in called] == [id(linear) for linear in linears]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_inspect_counts_parameters_from_model_and_from_config(model_type: str) -> None:
    model = tiny_model(model_type)
    rows, from_config = inspect_model(model), layer_rows(model.config)
    assert rows == from_config
    assert len(rows) == 3
    assert all(row["prunable"] and row["heads"] == 4 and row["ffn_width"] == 64 for row in rows)
    assert rows[0]["parameters"] == sum(parameter.numel() for parameter in layers_of(model)[0].parameters())


REFUSED: list[tuple[Any, str]] = [
    (transformers.BloomConfig(), "bloom"),
    (transformers.MT5Config(), "mt5"),
    (transformers.FalconConfig(), "falcon"),
    (transformers.AlbertConfig(), "albert"),
    (tiny_config("bert", is_decoder=True), "decoder"),
    (tiny_config("bert", add_cross_attention=True), "cross-attention"),
    (tiny_config("bert", position_embedding_type="relative_key"), "relative_key"),
    (tiny_config("roberta", position_embedding_type="relative_key_query"), "relative_key_query"),
    (tiny_config("electra", chunk_size_feed_forward=2), "chunk_size_feed_forward"),
    (tiny_config("bert", num_attention_heads=5), "do not divide"),
    (tiny_config("bert", pruned_heads={0: [1]}), "pruned_heads"),
    (tiny_config("deberta-v2", conv_kernel_size=3), "conv_kernel_size 3: a convolution"),
    (tiny_config("deberta-v2", attention_head_size=16), "attention_head_size 16"),
    (tiny_config("t5", is_decoder=True), "decoder"),
]


def test_choices_are_one_type_a_family_and_say_where_all_stand() -> None:
    names, _, rest = CHOICES.partition(" and ")
    assert {"bert", "modernbert", "deberta-v2", "vit", "llama"} <= set(names.split(", ")) <= set(ARCHITECTURES)
    assert "inspect --types" in rest


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_others_are_refused_naming_reason_and_choices(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        architecture_of(config)
    assert str(caught.value).index(reason) < str(caught.value).index(CHOICES)  # the reason first, then the choices
    (row,) = layer_rows(config)
    assert not row["prunable"]
    assert reason in row["reason"]
