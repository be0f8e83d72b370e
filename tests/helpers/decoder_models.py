"""Tiny random causal language models of transformers, and the same as plain parts; no downloads."""

from __future__ import annotations

import copy
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor

from exporters.decoder_parts import DecoderParts
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.models.causal_parts import causal_parts

VOCABULARY, POSITIONS = 61, 48
HIDDEN, HEAD_DIM = 32, 16
# By name: the kind, and what a case is about.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-narrow": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "mistral": ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"num_attention_heads": 4}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 1, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "gpt_neox-serial": ("gpt_neox", {"num_attention_heads": 2, "rotary_pct": 0.25, "use_parallel_residual": False}),
}


def causal_model(case: str, **changes: Any) -> Any:
    """3 layers, hidden 32, FFN 64, 48 positions; every bias and norm is random, so that none can be forgotten."""
    model_type, special = CASES[case]
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 3, "max_position_embeddings": POSITIONS}
    sizes |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS, "n_inner": 64, **sizes}
        for renamed in ("hidden_size", "num_hidden_layers", "max_position_embeddings"):
            sizes.pop(renamed)
    sizes["ffn_dim" if model_type == "opt" else "intermediate_size"] = 64
    if model_type == "opt":
        sizes["word_embed_proj_dim"] = HIDDEN
    config = transformers.AutoConfig.for_model(
        model_type, **{**sizes, **special, "attn_implementation": "eager", **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            spread = 0.25 if tensor.dim() > 1 else 0.1
            noise = torch.randn(tensor.shape, generator=generator) * spread
            tensor.copy_(noise if tensor.dim() > 1 else tensor + noise)
    return model


def decoder_parts(model: Any) -> DecoderParts:
    """Parts of a model that :func:`causal_model` made, which is not changed."""
    return causal_parts(as_linears(copy.deepcopy(model)))


def skip_in_old_engine(form: str, oldest: tuple[int, int]) -> None:
    """Skip where ONNX Runtime is older than what the test needs of GroupQueryAttention."""
    release = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    if form == "onnxruntime" and release < oldest:
        pytest.skip(f"ONNX Runtime computes this right from {oldest[0]}.{oldest[1]} on")


def skip_where_windows_are_wrong(case: str, form: str) -> None:
    """Skip models with windows where the operator has a token too many in them."""
    if CASES[case][0] == "mistral":
        skip_in_old_engine(form, (1, 24))


def token_ids(batch_size: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids ``[batch_size, tokens]``, none of them special."""
    return torch.randint(3, VOCABULARY, (batch_size, tokens), generator=torch.Generator().manual_seed(seed))
