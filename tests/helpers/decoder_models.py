"""Tiny random causal language models of transformers, and the same as plain parts; no downloads."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from exporters.decoder_parts import (
    AttentionPart,
    DecoderParts,
    FeedForwardPart,
    LayerPart,
    LinearPart,
    NormPart,
    RotaryPart,
)

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
    """Parts of a model that :func:`causal_model` made."""
    return {"gpt2": _gpt2, "opt": _opt, "gpt_neox": _gpt_neox}.get(model.config.model_type, _llama)(model)


def _llama(model: Any) -> DecoderParts:
    config, inner = model.config, model.model
    window = getattr(config, "sliding_window", None)
    layers = []
    for layer in inner.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        part = AttentionPart(
            query=_linear(attention.q_proj),
            key=_linear(attention.k_proj),
            value=_linear(attention.v_proj),
            output=_linear(attention.o_proj),
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=attention.head_dim**-0.5,
            query_norm=_rms(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_rms(attention.k_norm) if hasattr(attention, "k_norm") else None,
            window=window if config.model_type == "mistral" else None,
        )
        gated = FeedForwardPart(
            _linear(feed_forward.up_proj), _linear(feed_forward.down_proj), "silu", _linear(feed_forward.gate_proj)
        )
        norms = _rms(layer.input_layernorm), _rms(layer.post_attention_layernorm)
        layers.append(LayerPart(norms[0], part, norms[1], gated))
    head = None if config.tie_word_embeddings else _linear(model.lm_head)
    rotary = RotaryPart(inner.rotary_emb.inv_freq)
    return DecoderParts(
        inner.embed_tokens.weight, None, tuple(layers), _rms(inner.norm), head, rotary, config.max_position_embeddings
    )


def _gpt2(model: Any) -> DecoderParts:
    config, inner = model.config, model.transformer
    layers = []
    for layer in inner.h:
        fused, output = _conv1d(layer.attn.c_attn), _conv1d(layer.attn.c_proj)
        rows = [slice(index * HIDDEN, (index + 1) * HIDDEN) for index in range(3)]
        assert fused.bias is not None
        query, key, value = (LinearPart(fused.weight[row], fused.bias[row]) for row in rows)
        width = HIDDEN // config.n_head
        part = AttentionPart(query, key, value, output, config.n_head, config.n_head, width, width**-0.5)
        plain = FeedForwardPart(_conv1d(layer.mlp.c_fc), _conv1d(layer.mlp.c_proj), "gelu_tanh")
        layers.append(LayerPart(_layer_norm(layer.ln_1), part, _layer_norm(layer.ln_2), plain))
    positions = inner.wpe.weight
    return DecoderParts(inner.wte.weight, positions, tuple(layers), _layer_norm(inner.ln_f), None, None, len(positions))


def _opt(model: Any) -> DecoderParts:
    config, inner = model.config, model.model.decoder
    layers = []
    for layer in inner.layers:
        attention, count = layer.self_attn, config.num_attention_heads
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        query, key, value, output = map(_linear, linears)
        width = HIDDEN // count
        part = AttentionPart(query, key, value, output, count, count, width, width**-0.5)
        plain = FeedForwardPart(_linear(layer.fc1), _linear(layer.fc2), "relu")
        norms = _layer_norm(layer.self_attn_layer_norm), _layer_norm(layer.final_layer_norm)
        layers.append(LayerPart(norms[0], part, norms[1], plain))
    positions = inner.embed_positions.weight[inner.embed_positions.offset :]
    norm = _layer_norm(inner.final_layer_norm)
    return DecoderParts(inner.embed_tokens.weight, positions, tuple(layers), norm, None, None, len(positions))


def _gpt_neox(model: Any) -> DecoderParts:
    config, inner = model.config, model.gpt_neox
    layers = []
    for layer in inner.layers:
        count = config.num_attention_heads
        width = HIDDEN // count
        fused = layer.attention.query_key_value
        # [heads, query or key or value, head_dim, hidden]
        weights = fused.weight.reshape(count, 3, width, HIDDEN)
        biases = fused.bias.reshape(count, 3, width)
        query, key, value = (
            LinearPart(weights[:, index].reshape(-1, HIDDEN), biases[:, index].reshape(-1)) for index in range(3)
        )
        output = _linear(layer.attention.dense)
        part = AttentionPart(query, key, value, output, count, count, width, width**-0.5)
        plain = FeedForwardPart(_linear(layer.mlp.dense_h_to_4h), _linear(layer.mlp.dense_4h_to_h), "gelu")
        norms = _layer_norm(layer.input_layernorm), _layer_norm(layer.post_attention_layernorm)
        layers.append(LayerPart(norms[0], part, norms[1], plain, parallel=config.use_parallel_residual))
    return DecoderParts(
        inner.embed_in.weight,
        None,
        tuple(layers),
        _layer_norm(inner.final_layer_norm),
        _linear(model.get_output_embeddings()),
        RotaryPart(inner.rotary_emb.inv_freq),
        config.max_position_embeddings,
    )


def _linear(module: Any) -> LinearPart:
    return LinearPart(module.weight, module.bias)


def _conv1d(module: Any) -> LinearPart:
    return LinearPart(module.weight.T, module.bias)


def _rms(module: Any) -> NormPart:
    return NormPart("rms", module.weight, module.variance_epsilon)


def _layer_norm(module: nn.LayerNorm) -> NormPart:
    return NormPart("layer", module.weight, module.eps, module.bias)


def token_ids(batch_size: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids ``[batch_size, tokens]``, none of them special."""
    return torch.randint(3, VOCABULARY, (batch_size, tokens), generator=torch.Generator().manual_seed(seed))
