"""The encoders with rotary positions and mostly gated FFNs that can be pruned, one entry each.

Heads of all of them leave freely: rotary positions and windows of local attention are the same for every head.

Models that lose whole layers and number the others anew, as mmBERT's small ones, must see to it that the last layer has
global attention. Here layers keep their place, window and frequencies, whatever is dropped of them, so no rule says
which stay: a plan that drops the last global attention has the loss that was measured for it.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import CONFIG_MAPPING, ModernBertConfig

from ziplm_deploy.models.architectures.base import Architecture


def _modernbert() -> Architecture:
    """ModernBERT; its attention counts heads until transformers 5."""
    newer = Architecture(
        "modernbert",
        layers="layers",
        attention="attn",
        query="Wqkv",
        fused="thirds",
        head_count=None,
        head_width=None,
        attention_output="attn.Wo",
        ffn="mlp",
        ffn_input="Wi",
        ffn_fused=True,
        ffn_output="mlp.Wo",
        ffn_residual="mlp_norm",
        attention_norm="attn_norm",
        ffn_norm="mlp_norm",
        shared_inputs=("attention_mask", "position_embeddings"),
        layer_returns_tuple=False,
        rotates=True,
    )
    # By its configuration: older models start torch's compiler when they are imported.
    if hasattr(ModernBertConfig, "layer_types"):
        return newer
    return replace(
        newer,
        head_count="num_heads",
        head_width="all_head_size",
        shared_inputs=("attention_mask", "sliding_window_mask"),  # each attention turns heads by itself
        layer_returns_tuple=True,
    )


_NOMIC_BERT = Architecture(
    "nomic_bert",
    in_optimum=False,
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
    ffn_residual="mlp",
    shared_inputs=("attention_mask", "position_embeddings"),
    layer_returns_tuple=False,
    rotates=True,
    renamed={
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
    },
)
_EUROBERT = replace(
    _NOMIC_BERT,
    model_type="eurobert",
    ffn_residual="post_attention_layernorm",
    attention_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    config_kv_heads="num_key_value_heads",
    renamed={"clf_pooling": "classifier_pooling"},
)
_JINA_V3 = replace(_NOMIC_BERT, model_type="jina_embeddings_v3", ffn_input="fc1", ffn_gate=None, ffn_output="mlp.fc2")
# Of transformers 5; older ones would have to run code of the checkpoint.
_SINCE_5 = (_NOMIC_BERT, replace(_NOMIC_BERT, model_type="gte"), _JINA_V3, _EUROBERT)

MODERN_ENCODERS = (_modernbert(), *(entry for entry in _SINCE_5 if entry.model_type in CONFIG_MAPPING))
