"""The encoders that can be pruned, one entry each; a new one needs no other line of code.

An entry names what differs from BERT, by attribute paths in the classes of transformers: :class:`Architecture`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from ziplm_deploy.models.architectures.base import Architecture


class HeadSlicedMPNetAttention(MPNetSelfAttention):
    """MPNet attention with fewer heads: the shared position bias ``[1, heads, q, k]`` is cut to the kept heads."""

    kept_heads: torch.Tensor  # int64 [k], buffer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if position_bias is not None:
            position_bias = position_bias.index_select(1, self.kept_heads)  # [1, k, q, k_len]
        outputs: tuple[torch.Tensor, ...] = super().forward(  # type: ignore[no-untyped-call]
            hidden_states, attention_mask, head_mask, position_bias, output_attentions, **kwargs
        )
        return outputs


ENCODERS = (
    Architecture("bert"),
    Architecture("roberta"),
    Architecture("xlm-roberta"),
    Architecture("electra"),
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
    ),
    Architecture(
        "vit",
        attention="attention.attention",
        ffn_residual="layernorm_after",
        attention_norm="layernorm_before",
        ffn_norm="layernorm_after",
    ),
)
