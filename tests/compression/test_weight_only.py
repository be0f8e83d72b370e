"""Weight-only forms beside INT8: which linears get them, what is ranked, who refuses them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters import DecoderExportSettings, export_decoder
from exporters.names import HEAD
from exporters.nbits_matmul import round_blocks
from tests.helpers.decoder_models import causal_model, decoder_parts, skip_in_old_engine
from tests.helpers.int8_files import constants
from tests.helpers.pipeline import causal_recipe, raw_recipe
from ziplm_deploy.compression import treatment
from ziplm_deploy.compression.int8.causal import linear_groups
from ziplm_deploy.compression.int8.quantize import linear_names, quantize, quantized_linears
from ziplm_deploy.compression.int8.sensitivity import rank_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.compression.int8.weight_only import (
    asked_bits,
    check_bits,
    check_patterns,
    weight_only_linears,
    weights_rounded,
)
from ziplm_deploy.compression.treatment import served_int8
from ziplm_deploy.engines.runner import onnx_runner
from ziplm_deploy.errors import EngineError, RecipeError, UsageError
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.recipe import Int8Config, parse_recipe
from ziplm_deploy.stages import checks

SETTINGS = Int8Settings(Int8Config(), "onnxruntime", reduce_range=True)
BATCH = {"input_ids": np.arange(3, 15).reshape(1, 12), "attention_mask": np.ones((1, 12), np.int64)}
DOWN, KEPT = "layers.1.feed_forward.down", "layers.0.attention.output"


def exported(case: str, folder: Path, form: Any = "onnxruntime", **changes: Any) -> tuple[Any, Path]:
    model = causal_model(case, **changes)
    path = folder / f"{case}-{form}.onnx"
    export_decoder(decoder_parts(model), path, DecoderExportSettings(max_length=24, form=form))
    return as_linears(copy.deepcopy(model)), path


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_forms_stand_side_by_side(case: str, tmp_path: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    _, path = exported(case, tmp_path)
    target, only = tmp_path / "made.onnx", tmp_path / "only.onnx"
    asked = {HEAD: 8, DOWN: 4}
    quantize(path, target, SETTINGS, keep_fp32=[KEPT], weight_only=asked)
    assert weight_only_linears(target) == asked
    assert set(quantized_linears(target)) == set(linear_names(path)) - asked.keys() - {KEPT}
    assert linear_names(target) == (KEPT,)
    quantize(path, only, SETTINGS, weight_only=dict.fromkeys(linear_names(path), 8))
    assert quantized_linears(only) == linear_names(only) == ()
    expected, mixed, eight = (onnx_runner(each)(BATCH)["logits"] for each in (path, target, only))
    assert np.linalg.norm(eight - expected) < 0.12 * np.linalg.norm(expected)
    assert np.linalg.norm(mixed - expected) < 0.3 * np.linalg.norm(expected)
    metadata = {item.key: item.value for item in onnx.load(target).metadata_props}
    assert "MatMulNBits" in metadata["contrib_ops"]


def test_massive_activations_ruin_int8_but_not_eight_bit_weights(tmp_path: Path) -> None:
    skip_in_old_engine("onnxruntime", (1, 23))
    model = causal_model("llama", intermediate_size=1024)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] /= 3000
        model.model.layers[1].mlp.up_proj.weight[5] *= 3000  # the same function, through one massive activation
    path = tmp_path / "model.onnx"
    export_decoder(decoder_parts(model), path, DecoderExportSettings(max_length=24))
    others = [name for name in linear_names(path) if name != DOWN]
    quantize(path, tmp_path / "int8.onnx", SETTINGS, keep_fp32=others)
    quantize(path, tmp_path / "eight.onnx", SETTINGS, keep_fp32=others, weight_only={DOWN: 8})
    expected, ruined, held = (
        onnx_runner(tmp_path / f"{name}.onnx")(BATCH)["logits"] for name in ("model", "int8", "eight")
    )
    errors = [np.linalg.norm(found - expected) / np.linalg.norm(expected) for found in (ruined, held)]
    assert errors[0] > 3 * errors[1]  # other inputs of the massive one's block are lost, the rest is not


@pytest.mark.parametrize("bits", [8, 4])
def test_torch_computes_as_the_file_does(bits: int, tmp_path: Path) -> None:
    """Inputs included, which the operator rounds: where one is massive, its block loses more than its weights do."""
    skip_in_old_engine("onnxruntime", (1, 23))
    model, path = exported("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] /= 1000
        model.model.layers[1].mlp.up_proj.weight[5] *= 1000
    export_decoder(decoder_parts(model), path, DecoderExportSettings(max_length=24))
    target, ids = tmp_path / "made.onnx", torch.from_numpy(BATCH["input_ids"])
    others = [name for name in linear_names(path) if name != DOWN]
    plain_embeddings = Int8Settings(Int8Config(embeddings=False), "onnxruntime", reduce_range=True)
    quantize(path, target, plain_embeddings, keep_fp32=others, weight_only={DOWN: bits})
    linear = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        plain = model(ids).logits.numpy()
        with weights_rounded([linear], bits):
            found = model(ids).logits.numpy()
    made = onnx_runner(target)(BATCH)["logits"]
    assert np.linalg.norm(found - made) < 0.3 * np.linalg.norm(plain - made)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(round_blocks(linear.weight.numpy(), bits).weight))
        weights_alone = model(ids).logits.numpy()
    assert np.linalg.norm(found - made) < 0.3 * np.linalg.norm(weights_alone - made)
    assert not linear._forward_pre_hooks


def test_a_weight_only_head_frees_the_embedding(tmp_path: Path) -> None:
    _, path = exported("llama", tmp_path, vocab_size=5000, hidden_size=96)
    target = tmp_path / "made.onnx"
    quantize(path, target, SETTINGS, weight_only={HEAD: 8})
    found = constants(onnx.load(target).graph)
    large = {name: value.dtype for name, value in found.items() if 5000 in value.shape and "scale" not in name}
    assert large == {"/head/MatMul_quant.weight": np.uint8, "embedding.weight_int8": np.int8}
    assert path.stat().st_size > 1.7 * target.stat().st_size


def test_requests_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, path = exported("llama", tmp_path)
    target = tmp_path / "made.onnx"
    with pytest.raises(UsageError, match=f"{HEAD} in keep_fp32 or in weight_only, found it in both"):
        quantize(path, target, SETTINGS, keep_fp32=[HEAD], weight_only={HEAD: 8})
    with pytest.raises(UsageError, match=r"in weight_only, such as layers\.0\..*, found 'neck'"):
        quantize(path, target, SETTINGS, weight_only={"neck": 8})
    static = Int8Settings(Int8Config(method="static"), "onnxruntime", reduce_range=True)
    with pytest.raises(UsageError, match=r"int8\.method dynamic for weight-only linears, found static"):
        quantize(path, target, static, weight_only={HEAD: 8})
    _, portable = exported("llama", tmp_path, "portable")
    with pytest.raises(UsageError, match="standard operators only in the portable form"):
        quantize(portable, target, SETTINGS, weight_only={HEAD: 8})
    assert not target.exists()


def test_linears_with_fewer_bits_are_ranked_by_those(tmp_path: Path) -> None:
    model, path = exported("llama", tmp_path)
    names = linear_names(path)
    batches = [{"input_ids": torch.arange(3, 27).reshape(2, 12), "attention_mask": torch.ones(2, 12).long()}]
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def divergence(candidate: torch.nn.Module, changed: Sequence[str] = ()) -> float:
        return float((candidate(**batches[0]).logits - expected).square().mean())

    expected = model(**batches[0]).logits.detach()
    found = {}
    for bits in (8, 4):
        groups = linear_groups(model, names)
        rows = rank_linears(model, batches, divergence, SETTINGS, groups=groups, weight_only=dict.fromkeys(names, bits))
        found[bits] = {row.name: row.divergence for row in rows}
        assert [row.divergence for row in rows] == sorted(found[bits].values(), reverse=True)
    assert set(found[4]) == set(names)
    assert all(found[4][name] > 20 * found[8][name] > 0 for name in names)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_is_rounded_without_the_embedding(tmp_path: Path) -> None:
    model, _ = exported("llama", tmp_path)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert head.weight is embedding
    with weights_rounded([head], 4):
        rounded = round_blocks(embedding.detach().numpy(), 4).weight
        np.testing.assert_array_equal(head.weight.detach().numpy(), rounded)
        assert model.get_input_embeddings().weight is embedding
    assert head.weight is embedding


def test_patterns_name_linears_of_the_file() -> None:
    names = ("layers.0.attention.qkv", "layers.0.feed_forward.up", "layers.1.feed_forward.up", HEAD)
    assert asked_bits(names, ["*.feed_forward.up", HEAD]) == dict.fromkeys(names[1:], 4)
    assert asked_bits(names, []) == {}
    check_patterns(names, [HEAD, "layers.?.feed_forward.*"])
    with pytest.raises(UsageError, match=r"such as layers.0.attention.qkv.*'\*.query', which fits none of 4"):
        check_patterns(names, [HEAD, "*.query"])


def test_weight_only_is_the_default_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(treatment, "has_bits", lambda version, bits: True)

    def fallback(**sections: Any) -> str | None:
        return served_int8(parse_recipe(causal_recipe(tmp_path, **sections))).fallback

    def asked(form: str) -> dict[str, Any]:
        return {"int8": {"fallback": form}}

    assert fallback() == "weight-only-8"
    assert fallback(compress=asked("float32")) is None
    assert fallback(export={"cache_form": "portable"}) is None
    assert served_int8(parse_recipe(raw_recipe(tmp_path))).fallback is None  # no decode calls: an encoder
    monkeypatch.setattr(treatment, "has_bits", lambda version, bits: False)
    assert fallback() is None
    assert fallback(compress=asked("weight-only-8")) == "weight-only-8"  # refused by the checks


def test_recipes_that_ask_for_the_impossible_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eight, four = {"fallback": "weight-only-8"}, {"weight_only_4": ["head"]}
    for asked, field in ((eight, "fallback"), (four, "weight_only_4")):
        compress = {"variants": ["int8"], "int8": asked}
        with pytest.raises(RecipeError, match=f"found compress.int8.{field}: they are those of causal"):
            checks.check_task(parse_recipe(raw_recipe(tmp_path, compress=compress)))
        portable = causal_recipe(tmp_path, compress=compress, export={"cache_form": "portable"})
        with pytest.raises(RecipeError, match=f"onnxruntime for compress.int8.{field}, found portable"):
            checks.check_task(parse_recipe(portable))
        static = {"variants": ["int8"], "int8": {**asked, "method": "static"}}
        with pytest.raises(RecipeError, match=f"int8.{field}.* needs method: dynamic"):
            parse_recipe(causal_recipe(tmp_path, compress=static))
    old = type("Old", (), {"version": lambda self: "1.19.2"})()
    monkeypatch.setattr(checks, "get_engine", lambda name: old)
    with pytest.raises(EngineError, match=r"onnxruntime >= 1\.23 for compress.int8.fallback, found 1\.19\.2"):
        checks.check_compression(parse_recipe(causal_recipe(tmp_path, compress={"variants": ["int8"], "int8": eight})))
    checks.check_compression(parse_recipe(causal_recipe(tmp_path, compress={"variants": ["int8"]})))


@pytest.mark.parametrize(("version", "bits"), [("1.22.1", 8), ("1.19.2", 4)])
def test_old_engines_lack_bits(version: str, bits: int) -> None:
    with pytest.raises(EngineError, match=f"which has no {bits}-bit weight-only linears"):
        check_bits(version, bits, "compress.int8.fallback")
    for newer in ("1.23.0", "1.32.0", "2.0.1rc1"):
        check_bits(newer, bits, "compress.int8.fallback")
