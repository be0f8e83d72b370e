"""The encoders whose attention depends on distances between tokens, one entry each: DeBERTa v2 and v3, T5's encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ziplm_deploy.models.architectures.base import Architecture
from ziplm_deploy.models.architectures.disentangled import read_by_distance
from ziplm_deploy.models.architectures.position_bias import DroppedT5Attention, HeadSlicedT5Attention, share_bias

_DEBERTA = Architecture(
    "deberta-v2",
    query="query_proj",
    key="key_proj",
    value="value_proj",
    position_projections=("pos_key_proj", "pos_query_proj"),
    adapt=read_by_distance,
    shared_inputs=("attention_mask",),
    refused={"conv_kernel_size": (0, None)},
    why_refused={"conv_kernel_size": "a convolution after its first layer, which no cell of a table would hold"},
)


def _of_config(config: Any) -> Architecture:
    """T5's layers with a plain FFN or, since release 1.1 and in Flan-T5, a gated one."""
    return replace(_T5, ffn_input="wi_0", ffn_gate="wi_1") if config.is_gated_act else _T5


_T5 = Architecture(
    "t5",
    layers="encoder.block",
    attention="layer.0.SelfAttention",
    query="q",
    key="k",
    value="v",
    head_count="n_heads",
    head_width="inner_dim",
    attention_output="layer.0.SelfAttention.o",
    ffn="layer.1.DenseReluDense",
    ffn_input="wi",
    ffn_output="layer.1.DenseReluDense.wo",
    ffn_residual="layer.1",
    attention_norm="layer.0.layer_norm",
    ffn_norm="layer.1.layer_norm",
    config_layers="num_layers",
    config_ffn_width="d_ff",
    sliced_attention=HeadSlicedT5Attention,
    dropped_attention=DroppedT5Attention,
    shared_inputs=("position_bias",),
    adapt=share_bias,
    model_classes={
        "AutoModel": "T5EncoderModel",
        "AutoModelForSequenceClassification": None,
        "AutoModelForQuestionAnswering": None,
    },
    variant=_of_config,
)

RELATIVE = (_DEBERTA, _T5)
