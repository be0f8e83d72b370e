"""What training is refused for before it begins, and what it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.helpers.models import save_dense, tiny_model
from tests.helpers.pipeline import raw_recipe, write_rows
from ziplm_deploy.errors import UnsupportedModelError, UsageError
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.recipe import ModelConfig, RecoverConfig, parse_recipe
from ziplm_deploy.recovery.teacher_model import check_teacher
from ziplm_deploy.run.run import Run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16, "intermediate_size": 64}, "hidden_size 32"),
        ({"num_hidden_layers": 2}, "layers 3"),
        ({"num_labels": 5}, "num_labels 3"),
        ({"max_position_embeddings": 16}, "takes 32 tokens, found one for 16"),
        ({"id2label": {0: "no", 1: "maybe", 2: "yes"}}, "labels yes, maybe, no in this order, found no, maybe, yes"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    dense = tiny_model("bert", "text-classification")
    dense.config.id2label = {0: "Yes", 1: "Maybe", 2: "No"}  # type: ignore[union-attr]
    other = tiny_model("bert", "text-classification", **changes)
    with pytest.raises(UsageError, match=message):
        check_teacher(other, dense, RecoverConfig(), 32)
    check_teacher(dense, dense, RecoverConfig(), 32)


def test_only_what_is_compared_must_fit() -> None:
    dense = tiny_model("bert", "text-classification")
    fewer_layers = tiny_model("bert", "text-classification", num_hidden_layers=2)
    check_teacher(fewer_layers, dense, RecoverConfig(token_weight=0), 32)
    check_teacher(tiny_model("bert", "text-classification", num_labels=5), dense, RecoverConfig(logit_weight=0), 32)
    short = tiny_model("bert", "text-classification", max_position_embeddings=16)
    check_teacher(short, dense, RecoverConfig(), 16)


def test_a_new_head_is_made_only_where_training_asks_for_it(tmp_path: Path) -> None:
    save_dense(tmp_path / "base", "bert", "sentence-similarity")
    settings = ModelConfig(path=str(tmp_path / "base"), task="text-classification")
    with pytest.raises(UnsupportedModelError, match="they would be random"):
        load_dense(settings)
    model, _ = load_dense(settings, {"num_labels": 5})
    assert model.config.num_labels == 5  # type: ignore[union-attr]
    assert isinstance(model, transformers.BertForSequenceClassification)
    base, _ = load_dense(ModelConfig(path=str(tmp_path / "base"), task="sentence-similarity"))
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter, model.bert.get_parameter(name))  # type: ignore[operator, union-attr]


def test_a_new_head_follows_the_seed_whatever_was_drawn_before(tmp_path: Path) -> None:
    save_dense(tmp_path / "model", "bert", "sentence-similarity")
    write_rows(tmp_path / "train.jsonl", 40, 0)
    write_rows(tmp_path / "test.jsonl", 20, 1)

    def head(seed: int) -> torch.Tensor:
        torch.rand(3)
        recipe = parse_recipe(raw_recipe(tmp_path, seed=seed, dense={"train": True}))
        return Run(recipe).dense.model.get_parameter("classifier.weight")

    torch.testing.assert_close(head(0), head(0))
    assert not torch.equal(head(0), head(1))
