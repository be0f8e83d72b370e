"""The text encoders that can be pruned, one entry each; a new one needs no other line of code.

An entry names what differs from BERT, by attribute paths in the classes of transformers: :class:`Architecture`.
"""

from __future__ import annotations

from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from ziplm_deploy.models.architectures.base import Architecture
from ziplm_deploy.models.architectures.position_bias import HeadsOfBias


class HeadSlicedMPNetAttention(HeadsOfBias, MPNetSelfAttention):
    """MPNet attention with fewer heads."""


ENCODERS = (
    Architecture("bert"),
    Architecture("roberta"),
    Architecture("xlm-roberta"),
    Architecture("camembert"),
    Architecture("data2vec-text"),
    Architecture("ernie"),
    Architecture("electra"),
    Architecture(
        "xlm-roberta-xl",
        ffn_residual="LayerNorm",
        attention_norm="attention.self_attn_layer_norm",
        ffn_norm="LayerNorm",
    ),
    Architecture(
        "distilbert",
        layers="transformer.layer",
        attention="attention",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        head_count="n_heads",
        head_width="dim",
        attention_output="attention.out_lin",
        ffn="ffn",
        ffn_input="lin1",
        ffn_output="ffn.lin2",
        ffn_residual="ffn",
        config_layers="n_layers",
        config_ffn_width="hidden_dim",
    ),
    Architecture(
        "mpnet",
        attention="attention.attn",
        query="q",
        key="k",
        value="v",
        attention_output="attention.attn.o",
        sliced_attention=HeadSlicedMPNetAttention,
        shared_inputs=("position_bias",),
    ),
)
