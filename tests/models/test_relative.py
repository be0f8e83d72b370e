"""DeBERTa and T5: transformers' own answers ≡ adapted ≡ masked ≡ resized ≡ reloaded ≡ exported, at 1e-4 and below."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import nn

from exporters import EmbeddingModel, ExportSettings, check_parity, dummy_inputs, export_encoder
from tests.helpers.models import (
    AUTO_CLASSES,
    output_tensors,
    random_entries,
    save_dense,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from ziplm_deploy.compression.int8.fake_quant import module_ranges, quantizable_linears
from ziplm_deploy.compression.int8.quantize import linear_names
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.adapted import adapted, model_class
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.inspection import layer_rows
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import layers_of
from ziplm_deploy.models.resizing import masked, resize
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers

UNSHARED: dict[str, Any] = {"share_att_key": False}
GATED = {"feed_forward_proj": "gated-gelu"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "as v3": ("deberta-v2", {}),
    "own projections of positions": ("deberta-v2", UNSHARED),
    "c2p only": ("deberta-v2", UNSHARED | {"pos_att_type": ["c2p"]}),
    "p2c only": ("deberta-v2", {"pos_att_type": ["p2c"]}),
    "no buckets": ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 6}),
    "absolute positions too": ("deberta-v2", {"position_biased_input": True, "norm_rel_ebd": "none"}),
    "absolute positions only": ("deberta-v2", {"position_biased_input": True, "relative_attention": False}),
    "t5": ("t5", {}),
    "gated t5": ("t5", GATED),
}
SIZES = {"0.attention": 2, "0.ffn": 24, "1.attention": 0, "1.ffn": 0, "2.attention": 3}
FIRST_DROPPED = {"0.attention": 0, "0.ffn": 0, "2.attention": 1}
CASES = [
    ("as v3", "text-classification", SIZES),
    ("as v3", "text-regression", FIRST_DROPPED),
    ("as v3", "question-answering", SIZES),
    ("as v3", "fill-mask", SIZES),
    ("own projections of positions", "token-classification", SIZES),
    ("own projections of positions", "sentence-similarity", FIRST_DROPPED),
    ("t5", "sentence-similarity", SIZES),
    ("t5", "token-classification", FIRST_DROPPED),
    ("gated t5", "sentence-similarity", FIRST_DROPPED),
    ("gated t5", "token-classification", SIZES),
]


def unadapted(form: str) -> nn.Module:
    """A random model as transformers builds it, with the weights of :func:`tiny_model`."""
    model_type, changes = FORMS[form]
    config = tiny_config(model_type, **changes)
    model = model_class(config, "AutoModel")(config).eval()
    model.load_state_dict(tiny_model(model_type, **changes).state_dict())
    return model  # type: ignore[no-any-return]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_transformers(form: str) -> None:
    own = unadapted(form)
    changed = adapted(copy.deepcopy(own))
    assert changed.state_dict().keys() == own.state_dict().keys()
    for length in (1, 2, 9, 40):
        inputs = tiny_inputs(own, seq_len=length)
        assert largest_difference(output_tensors(own, inputs), output_tensors(changed, inputs)) < 1e-5
    again = adapted(copy.deepcopy(changed))
    assert largest_difference(output_tensors(changed, inputs), output_tensors(again, inputs)) == 0.0


def test_texts_may_be_longer_than_the_positions_of_a_model() -> None:
    for form in ("as v3", "no buckets", "t5"):
        own = unadapted(form)
        inputs = tiny_inputs(own, seq_len=70)
        changed = adapted(copy.deepcopy(own))
        assert largest_difference(output_tensors(own, inputs), output_tensors(changed, inputs)) < 1e-5


def test_distances_of_real_deberta_are_those_of_its_pairs() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    config = tiny_config("deberta-v2", position_buckets=256, max_position_embeddings=512, num_hidden_layers=1)
    encoder = tiny_model("deberta-v2", position_buckets=256, max_position_embeddings=512, num_hidden_layers=1).encoder
    hidden = torch.zeros(1, 512, config.hidden_size)
    pairs = build_relative_position(hidden, hidden, 256, 512)[0]  # [query, key]
    rows = encoder.get_rel_pos(hidden)  # type: ignore[operator, union-attr]
    column = 511 - torch.arange(512)[:, None] + torch.arange(512)[None]  # of a query's and a key's distance
    assert torch.equal(rows[0][column], (pairs + 256).clamp(0, 511))
    assert torch.equal(rows[1][column], (256 - pairs).clamp(0, 511))


@pytest.mark.parametrize("form", FORMS)
def test_masked_in_transformers_equals_resized(form: str) -> None:
    own = unadapted(form)
    dense = adapted(copy.deepcopy(own))
    inputs = tiny_inputs(own)
    for sizes in (SIZES, FIRST_DROPPED, {"0.attention": 1}, {f"{layer}.attention": 0 for layer in range(3)}):
        entries = random_entries(dense, sizes)
        resized = resize(dense, entries)
        expected = output_tensors(masked(own, entries), inputs)
        assert largest_difference(expected, output_tensors(resized, inputs)) < 1e-5
        then = random_entries(resized, {"2.attention": 1, "2.ffn": 5} if sizes is SIZES else {"1.ffn": 7})
        both = dict(then)
        if sizes is SIZES:
            first = entries["2.attention"].kept
            both["2.attention"] = LevelWeights(
                first[then["2.attention"].kept], then["2.attention"].weight, then["2.attention"].bias, 0.5
            )
        expected = output_tensors(masked(own, entries | both), inputs)
        assert largest_difference(expected, output_tensors(resize(resized, then), inputs)) < 1e-5


@pytest.mark.parametrize(("form", "task", "sizes"), CASES)
def test_loaded_resized_reloaded_and_exported(form: str, task: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model_type, changes = FORMS[form]
    folder = tmp_path / "dense"
    save_dense(folder, model_type, task, **changes)
    settings = ModelConfig.model_validate({"path": str(folder), "task": task})
    dense, processor = load_dense(settings)
    loader = model_class(dense.config, AUTO_CLASSES[task])
    theirs = loader.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = tiny_inputs(dense)
    assert largest_difference(output_tensors(theirs, inputs), output_tensors(dense, inputs)) < 1e-5
    entries = random_entries(dense, sizes)
    resized = resize(dense, entries)
    expected = output_tensors(masked(theirs, entries), inputs)
    assert largest_difference(expected, output_tensors(resized, inputs)) < 1e-5
    save_member(tmp_path / "member", resized, processor, settings, {})
    reloaded = load(tmp_path / "member")
    assert largest_difference(output_tensors(resized, inputs), output_tensors(reloaded, inputs)) == 0.0
    served = EmbeddingModel(reloaded, "mean", True) if task == "sentence-similarity" else reloaded
    names = list(output_tensors(served, inputs))
    for shapes, lengths in (("static", [9]), ("dynamic", [1, 2, 9, 40])):
        export = ExportSettings(shapes=shapes, batch_size=2, seq_len=9)  # type: ignore[arg-type]
        path = tmp_path / f"{shapes}.onnx"
        export_encoder(served, dummy_inputs(served, export), names, path, export)
        assert all(check_parity(served, path, tiny_inputs(dense, 2, length), atol=1e-4) < 1e-4 for length in lengths)


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
@pytest.mark.parametrize("form", ["as v3", "own projections of positions"])
def test_a_file_holds_what_distances_give_and_not_how(form: str, shapes: str, tmp_path: Path) -> None:
    model = tiny_model(FORMS[form][0], **FORMS[form][1])
    settings = ExportSettings(shapes=shapes, batch_size=2, seq_len=9)  # type: ignore[arg-type]
    path = tmp_path / "model.onnx"
    export_encoder(model, dummy_inputs(model, settings), ["last_hidden_state"], path, settings)
    graph = onnx.load(path).graph
    operators = [node.op_type for node in graph.node]
    assert not {"GatherElements", "Log", "Where", "Gemm"} & set(operators)
    assert operators.count("MatMul") == 3 * (6 + 4)  # linears; content, two kinds of distances, values
    assert operators.count("LayerNormalization") == 1 + 3 * 2  # none of position embeddings
    assert not any("rel_embeddings" in tensor.name or "pos_" in tensor.name for tensor in graph.initializer)
    columns = 2 * 9 if shapes == "static" else 2 * 8  # one a distance of the length; one a row of the embeddings
    tables = [tensor for tensor in graph.initializer if sorted(tensor.dims) == sorted([4, 8, columns])]
    assert len(tables) == 3 * 2
    assert set(linear_names(path)) == set(quantizable_linears(model))
    assert len(linear_names(path)) == 3 * 6


def test_what_watches_linears_sees_tokens_only() -> None:
    dense = tiny_model("deberta-v2")
    ranges = module_ranges(dense, [tiny_inputs(dense)])
    far = tiny_model("deberta-v2")
    with torch.no_grad():
        far.encoder.LayerNorm.bias += 100  # type: ignore[union-attr, operator]
    first = "encoder.layer.0.attention.self.key_proj"
    assert module_ranges(far, [tiny_inputs(far)])[first] == ranges[first]


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_counted_from_the_configuration(form: str) -> None:
    model = adapted(unadapted(form))
    rows = layer_rows(model.config)  # type: ignore[arg-type]
    assert rows == layer_rows(model)
    assert rows[0]["parameters"] == sum(parameter.numel() for parameter in layers_of(model)[0].parameters())


@pytest.mark.parametrize("form", ["own projections of positions", "t5"])
def test_gradients_reach_what_distances_are_made_of(form: str) -> None:
    model = resize(adapted(unadapted(form)), random_entries(adapted(unadapted(form)), FIRST_DROPPED)).train()
    model(**tiny_inputs(model))[0].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("task", ["text-classification", "question-answering"])
def test_t5_with_a_decoder_is_refused(task: str, tmp_path: Path) -> None:
    save_dense(tmp_path, "t5")
    with pytest.raises(UnsupportedModelError, match="a t5 whose class for it has a decoder"):
        load_dense(ModelConfig.model_validate({"path": str(tmp_path), "task": task}), {"num_labels": 2})


def test_the_encoder_of_a_whole_t5_is_taken(tmp_path: Path) -> None:
    config = tiny_config("t5", num_decoder_layers=5)
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(config).eval()
    save_dense(tmp_path, "t5")  # a tokenizer
    whole.save_pretrained(tmp_path)
    dense, _ = load_dense(ModelConfig.model_validate({"path": str(tmp_path), "task": "sentence-similarity"}))
    inputs = tiny_inputs(dense)
    with torch.no_grad():
        expected = whole.encoder(**inputs).last_hidden_state
    assert largest_difference({"last_hidden_state": expected}, output_tensors(dense, inputs)) < 1e-5
