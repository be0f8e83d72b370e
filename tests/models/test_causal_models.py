"""Causal language models: masked ≡ resized ≡ reloaded ≡ taken apart; grouped queries, gates, fused projections."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from exporters import DecoderExportSettings, check_decoder_parity, export_decoder
from exporters.decoder_parts import AttentionPart
from tests.helpers.decoder_reference import reference_logits
from tests.helpers.models import output_tensors, random_entries, tiny_causal_config, tiny_causal_model, tiny_tokenizer
from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import ARCHITECTURES, architecture_of
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.dense import load_dense
from ziplm_deploy.models.member_files import load, save_member
from ziplm_deploy.models.modules import model_shape, output_linear, prunable_modules
from ziplm_deploy.models.resizing import masked, random_resized, resize
from ziplm_deploy.recipe import ModelConfig

pytestmark = pytest.mark.transformers

CAUSAL = sorted(name for name, entry in ARCHITECTURES.items() if entry.causal is not None)
CONFIG = ModelConfig(path="", task="text-generation")
WIDE_HEADS = {"hidden_size": 64}  # heads of 16, a width that the fused attention takes
GROUPED = ("llama", "mistral", "qwen2", "qwen3")
PLANS = {
    "attention dropped": {"0.attention": 0},
    "ffn dropped": {"1.ffn": 0},
    "layer dropped": {"2.attention": 0, "2.ffn": 0},
    "fewer heads": {"0.attention": 1, "2.attention": 1},
    "narrow": {"0.ffn": 1, "1.ffn": 17, "2.ffn": 63},
    "mixed": {"0.attention": 0, "0.ffn": 24, "1.attention": 1, "1.ffn": 0, "2.ffn": 40},
    "all dropped": {f"{layer}.{kind}": 0 for layer in range(3) for kind in ("attention", "ffn")},
}


def inputs_of(model: nn.Module, *, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0  # on the right
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: nn.Module) -> torch.Tensor:
    """Logits of the tokens that are no padding, ``[tokens, vocabulary]``."""
    inputs = inputs_of(model)
    return output_tensors(model, inputs)["logits"][inputs["attention_mask"].bool()]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("sizes", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("model_type", CAUSAL)
def test_masked_equals_resized_equals_its_parts(model_type: str, sizes: dict[str, int]) -> None:
    dense = tiny_causal_model(model_type)
    before = logits_of(dense)
    entries = random_entries(dense, sizes)
    resized = resize(dense, entries)
    found = logits_of(resized)
    assert difference(logits_of(masked(dense, entries)), found) < 1e-5
    assert difference(before, found) > 1e-3
    assert difference(before, logits_of(dense)) == 0.0
    inputs = inputs_of(resized)
    by_parts = reference_logits(causal_parts(resized), inputs["input_ids"])[inputs["attention_mask"].bool()]
    assert difference(by_parts, found) < 1e-4


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_parts_of_a_dense_model_compute_what_it_computes(model_type: str) -> None:
    model = tiny_causal_model(model_type)
    ids = inputs_of(model)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert difference(reference_logits(causal_parts(model), ids), expected) < 1e-4


@pytest.mark.parametrize("model_type", GROUPED)
def test_a_head_leaves_with_all_query_heads_that_read_it(model_type: str) -> None:
    dense = tiny_causal_model(model_type)
    shape = model_shape(dense.config)
    assert (shape.n_heads, shape.queries_per_head) == (2, 2)
    block = random_resized(dense, {"1.attention": 1}).base_model.layers[1].self_attn
    assert block.q_proj.out_features == block.o_proj.in_features == 2 * shape.head_dim
    assert block.k_proj.out_features == block.v_proj.out_features == shape.head_dim


def test_linears_without_bias_get_one_only_where_it_adds_something() -> None:
    dense = tiny_causal_model("llama")
    plain = random_resized(dense, {"0.ffn": 8, "1.attention": 1})
    shifted = resize(dense, random_entries(dense, {"0.ffn": 8}))
    ffn = prunable_modules(dense)[1]
    assert output_linear(plain, ffn).bias is None
    assert output_linear(shifted, ffn).bias is not None


@pytest.mark.parametrize("model_type", CAUSAL)
def test_reloaded_members_answer_exactly_as_saved(model_type: str, tmp_path: Path) -> None:
    dense = tiny_causal_model(model_type)
    full = random_entries(dense, {"2.attention": prunable_modules(dense)[4].structures})
    for name, sizes in PLANS.items():
        resized = resize(dense, {**random_entries(dense, sizes), **(full if name == "narrow" else {})})
        folder = tmp_path / name
        save_member(folder, resized, tiny_tokenizer(tmp_path / "tokenizer"), CONFIG, {})
        again = load(folder)
        saved, read = resized.state_dict(), again.state_dict()
        assert saved.keys() == read.keys()
        assert all(torch.equal(saved[key], read[key]) for key in saved)
        # Where a tensor lies in memory may change the last digit of a product.
        assert difference(logits_of(again), logits_of(resized)) < 1e-5
        assert resize(again, {}).ziplm_kept == resized.ziplm_kept


@pytest.mark.parametrize("sizes", [PLANS["mixed"], PLANS["fewer heads"]], ids=["mixed", "fewer heads"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_cache_of_other_heads_gives_the_same_logits(model_type: str, sizes: dict[str, int]) -> None:
    resized = resize(tiny_causal_model(model_type), random_entries(tiny_causal_model(model_type), sizes))
    ids = inputs_of(resized, padded=False)["input_ids"]
    with torch.no_grad():
        whole = resized(input_ids=ids, use_cache=False).logits
        first = resized(input_ids=ids[:, :6], use_cache=True)
        name = "cache" if "cache" in inspect.signature(resized.forward).parameters else "past_key_values"
        cached = {name: first.past_key_values, "position_ids": torch.arange(6, 9).expand(2, -1)}
        rest = resized(input_ids=ids[:, 6:], **cached)
    assert difference(rest.logits, whole[:, 6:]) < 1e-5
    assert difference(first.logits, whole[:, :6]) < 1e-5


def test_gpt2_linears_compute_what_its_own_did() -> None:
    own = transformers.AutoModelForCausalLM.from_config(tiny_causal_config("gpt2"), attn_implementation="eager").eval()
    inputs = inputs_of(own)
    before = output_tensors(own, inputs)["logits"]
    assert difference(before, output_tensors(as_linears(own), inputs)["logits"]) < 1e-6
    assert isinstance(own.transformer.h[0].attn.c_attn, nn.Linear)


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
        ("opt", {"word_embed_proj_dim": 16}, "embeddings of 16"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "4 query heads that 3 cached heads"),
    ],
)
def test_variants_whose_blocks_differ_are_refused(model_type: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        architecture_of(tiny_causal_config(model_type, **changes))


@pytest.mark.parametrize(("model_type", "window"), [("llama", None), ("gpt_neox", None), ("mistral", 4)])
def test_a_window_counts_only_where_transformers_reads_it(model_type: str, window: int | None) -> None:
    model = tiny_causal_model(model_type)
    model.config.sliding_window = 4  # kept like any field, by all of them
    attention = causal_parts(model).layers[0].attention
    assert isinstance(attention, AttentionPart)
    assert attention.window == window


def test_frequencies_that_depend_on_the_text_are_refused() -> None:
    model = tiny_causal_model("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UnsupportedModelError, match="rope_type 'dynamic'"):
        causal_parts(model)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="expected an activation of silu"):
        causal_parts(tiny_causal_model("llama", hidden_act="tanh"))


def test_encoders_have_no_parts() -> None:
    from tests.helpers.models import tiny_model

    with pytest.raises(UnsupportedModelError, match="expected a causal language model, found a bert"):
        causal_parts(tiny_model("bert"))


def test_causal_models_are_refused_for_tasks_of_encoders(tmp_path: Path) -> None:
    tiny_causal_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="expected an encoder for text-classification, found the causal"):
        load_dense(ModelConfig(path=str(tmp_path), task="text-classification"))


@pytest.mark.parametrize("model_type", CAUSAL)
def test_generation_with_a_cache_finds_the_tokens_that_it_finds_without(model_type: str) -> None:
    resized = resize(tiny_causal_model(model_type), random_entries(tiny_causal_model(model_type), PLANS["mixed"]))
    prompt = {"input_ids": torch.tensor([[5, 17, 8, 30]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 999, "pad_token_id": 0}
    found = [resized.generate(**prompt, **settings, use_cache=use_cache) for use_cache in (True, False)]  # type: ignore[operator]
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["onnxruntime", "portable"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_exported_members_answer_like_torch(model_type: str, form: Any, tmp_path: Path) -> None:
    dense = tiny_causal_model(model_type, **({} if model_type == "qwen3" else WIDE_HEADS))
    for name, sizes in PLANS.items():
        resized = resize(dense, random_entries(dense, sizes))
        path = tmp_path / f"{name}.onnx"
        export_decoder(causal_parts(resized), path, DecoderExportSettings(max_length=24, form=form))

        def logits_of(ids: torch.Tensor, resized: Any = resized) -> torch.Tensor:
            return resized(input_ids=ids).logits  # type: ignore[no-any-return]

        check_decoder_parity(logits_of, path, [[5, 9, 30, 41, 8, 17, 22], [33, 6, 7]], atol=1e-4)
