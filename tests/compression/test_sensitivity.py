"""Which linears INT8 hurts: outliers are found, the most sensitive come first, and the budget search ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.int8_files import settings_of
from tests.helpers.models import output_tensors, tiny_inputs, tiny_model
from ziplm_deploy.compression.int8.fake_quant import QuantizedLinear, quantizable_linears
from ziplm_deploy.compression.int8.sensitivity import SensitivityRow, rank_linears
from ziplm_deploy.errors import DataError, NumericalError
from ziplm_deploy.recipe import Int8Config

CONFIG = Int8Config(method="static")


class Divergence:
    """Mean squared difference from what the model answered at first; remembers what was quantized at each call."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs = tiny_inputs(model, 2, 9)
        self.expected = output_tensors(model, self.inputs)["last_hidden_state"]
        self.quantized: list[str] = []

    def __call__(self, model: nn.Module, changed: Sequence[str] = ()) -> float:
        quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
        assert quantized == list(changed)
        self.quantized += quantized
        found = output_tensors(model, self.inputs)["last_hidden_state"]
        return float((found - self.expected).square().mean())


def list_all(model: nn.Module, config: Int8Config = CONFIG, **settings: Any) -> list[SensitivityRow]:
    divergence = Divergence(model)
    batches = [tiny_inputs(model, 2, 9, seed) for seed in range(3)]
    return rank_linears(model, batches, settings.get("divergence", divergence), settings_of(config))


def test_every_linear_is_quantized_alone_and_the_model_is_unchanged() -> None:
    model = tiny_model("bert")
    divergence = Divergence(model)
    found = list_all(model, divergence=divergence)
    assert divergence.quantized == list(quantizable_linears(model))
    assert sorted(row.name for row in found) == sorted(divergence.quantized)
    assert [row.divergence for row in found] == sorted((row.divergence for row in found), reverse=True)
    assert all(row.divergence > 0 and row.activation_outliers >= 1 and row.weight_outliers >= 1 for row in found)
    assert divergence(model) == 0
    assert not any(row.ruined_by_outliers for row in found)


def test_a_weight_of_a_thousand_times_the_others_ruins_its_linear() -> None:
    model = tiny_model("bert")
    linear = model.encoder.layer[1].attention.self.value  # type: ignore[union-attr]
    with torch.no_grad():
        linear.weight[2, 3] *= 1000 / linear.weight[2, 3].abs()
    found = {row.name: row for row in list_all(model, Int8Config(method="static", per_channel=False))}
    name = "encoder.layer.1.attention.self.value"
    assert found[name].weight_outliers > 500
    assert [row for row in found if found[row].weight_outliers > 16] == [name]
    assert found[name].ruined_by_outliers
    # With a scale for each output one output is lost, not all.
    by_channel = {row.name: row for row in list_all(model)}
    assert by_channel[name].weight_outliers > 100
    assert by_channel[name].divergence < 0.2 * found[name].divergence


def test_outliers_at_padding_are_none() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = 0.0  # type: ignore[index, operator, union-attr]
        model.embeddings.word_embeddings.weight[0, 3] = 100.0  # type: ignore[index, operator, union-attr]
    batch = {**tiny_inputs(model, 2, 9), "attention_mask": torch.tensor([[1] * 4 + [0] * 5] * 2)}
    padding = {**batch, "input_ids": batch["input_ids"] * batch["attention_mask"]}  # token 0 where it does not count
    settings = settings_of(CONFIG)
    found = {row.name: row for row in rank_linears(model, [padding], Divergence(model), settings)}
    unpadded = {name: tensor[:, :4] for name, tensor in batch.items()}
    for row in rank_linears(model, [unpadded], Divergence(model), settings):
        assert found[row.name].activation_outliers == pytest.approx(row.activation_outliers, rel=1e-4)
        assert found[row.name].divergence == pytest.approx(row.divergence, rel=1e-2)


def test_outliers_of_activations_are_found_where_they_enter() -> None:
    model = tiny_model("bert", intermediate_size=2048)
    dense = model.encoder.layer[1].intermediate.dense  # type: ignore[union-attr]
    with torch.no_grad():
        dense.weight[7] *= 1000
    by_name = {row.name: row for row in list_all(model)}
    name = "encoder.layer.1.output.dense"
    assert by_name[name].activation_outliers > 50
    assert by_name[name].ruined_by_outliers
    assert [row for row in by_name if by_name[row].activation_outliers > 16] == [name]
    assert max(by_name.values(), key=lambda row: row.divergence).name == name


def test_zeros_are_no_outliers() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        for linear in quantizable_linears(model).values():
            linear.weight[:, 1:] = 0.0  # one weight an output is left
            linear.weight[0] = 0.0
    assert all(row.weight_outliers == 1.0 for row in list_all(model))


def test_progress_counts_the_linears() -> None:
    model, seen = tiny_model("bert", num_hidden_layers=1), list[tuple[int, int]]()
    rank_linears(model, [tiny_inputs(model)], Divergence(model), settings_of(CONFIG), lambda *step: seen.append(step))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_divergence_or_weights_that_are_not_finite_name_the_linear() -> None:
    model = tiny_model("bert")
    with pytest.raises(NumericalError, match=r"with encoder\.layer\.0\.attention\.self\.query in INT8, found nan"):
        list_all(model, divergence=lambda *_: float("nan"))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    with pytest.raises(DataError, match="found none"):
        rank_linears(model, [], lambda *_: 0.0, settings_of(CONFIG))


def test_a_divergence_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny_model("bert")

    def fail(*_: Any) -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        list_all(model, divergence=fail)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
