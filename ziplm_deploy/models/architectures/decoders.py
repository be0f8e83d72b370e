"""The causal language models that can be pruned, one entry each, by attribute paths in the classes of transformers.

Linears are :class:`torch.nn.Linear` everywhere: :func:`ziplm_deploy.models.causal.as_linears` has replaced GPT-2's.
"""

from __future__ import annotations

from dataclasses import replace

from ziplm_deploy.models.architectures.base import Architecture, CausalPaths

_LLAMA = Architecture(
    "llama",
    layers="layers",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    head_count=None,
    head_width=None,
    attention_output="self_attn.o_proj",
    ffn="mlp",
    ffn_input="up_proj",
    ffn_gate="gate_proj",
    ffn_output="mlp.down_proj",
    ffn_residual="post_attention_layernorm",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    config_kv_heads="num_key_value_heads",
    causal=CausalPaths(),
    refused={"is_causal": (True, None)},  # of gte-Qwen2 and others, whose own code attends to both sides
    why_refused={"is_causal": "its tokens attend to those after them, which files of causal models do not compute"},
)
_GPT2 = Architecture(
    "gpt2",
    layers="h",
    attention="attn",
    query="c_attn",
    fused="thirds",
    head_count="num_heads",
    head_width="split_size",
    attention_output="attn.c_proj",
    ffn="mlp",
    ffn_input="c_fc",
    ffn_output="mlp.c_proj",
    ffn_residual="ln_2",
    attention_norm="ln_1",
    ffn_norm="ln_2",
    config_layers="n_layer",
    config_ffn_width="n_inner",
    causal=CausalPaths(
        embedding="wte",
        final_norm="ln_f",
        positions="wpe",
        rotary=None,
    ),
    refused={"scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,)},
)
_OPT = Architecture(
    "opt",
    layers="decoder.layers",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    head_count="num_heads",
    head_width=None,
    attention_output="self_attn.out_proj",
    ffn="fc1",
    ffn_input="",
    ffn_output="fc2",
    ffn_residual="final_layer_norm",
    attention_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    config_ffn_width="ffn_dim",
    causal=CausalPaths(
        embedding="decoder.embed_tokens",
        final_norm="decoder.final_layer_norm",
        positions="decoder.embed_positions",
        first_position=2,
        rotary=None,
    ),
    refused={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
)
_GPT_NEOX = Architecture(
    "gpt_neox",
    layers="layers",
    attention="attention",
    query="query_key_value",
    fused="heads",
    head_count=None,
    head_width=None,
    attention_output="attention.dense",
    ffn="mlp",
    ffn_input="dense_h_to_4h",
    ffn_output="mlp.dense_4h_to_h",
    ffn_residual="post_attention_layernorm",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    causal=CausalPaths(embedding="embed_in", final_norm="final_layer_norm", parallel="use_parallel_residual"),
)

DECODERS = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral", causal=CausalPaths(has_window=True)),
    replace(_LLAMA, model_type="qwen2", causal=CausalPaths(has_window=True)),
    replace(_LLAMA, model_type="qwen3", causal=CausalPaths(query_norm="q_norm", key_norm="k_norm", has_window=True)),
    _GPT2,
    _OPT,
    _GPT_NEOX,
)
