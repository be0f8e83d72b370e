"""The encoders that can be pruned, one entry each; a new one needs no other line of code.

An entry names what differs from BERT, by attribute paths in the classes of transformers: :class:`Architecture`.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention
from transformers.models.vit import modeling_vit

from ziplm_deploy.models.architectures.base import Architecture


class HeadSlicedMPNetAttention(MPNetSelfAttention):
    """MPNet attention with fewer heads: the shared position bias ``[1, heads, q, k]`` is cut to the kept heads."""

    kept_heads: torch.Tensor  # int64 [k], buffer

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        # By name: transformers 5 has no head_mask in front of position_bias.
        call = inspect.signature(super().forward).bind(*args, **kwargs)
        position_bias: torch.Tensor | None = call.arguments.get("position_bias")
        if position_bias is not None:
            call.arguments["position_bias"] = position_bias.index_select(1, self.kept_heads)  # [1, k, q, k_len]
        outputs: tuple[torch.Tensor, ...] = super().forward(*call.args, **call.kwargs)  # type: ignore[no-untyped-call]
        return outputs


def _vit() -> Architecture:
    """ViT; its modules have other places and names since transformers 5.9."""
    older = Architecture(
        "vit",
        attention="attention.attention",
        ffn_residual="layernorm_after",
        attention_norm="layernorm_before",
        ffn_norm="layernorm_after",
    )
    if not hasattr(modeling_vit, "ViTMLP"):
        return older
    return replace(
        older,
        layers="layers",
        attention="attention",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        head_width=None,
        attention_output="attention.o_proj",
        ffn="mlp",
        ffn_input="fc1",
        ffn_output="mlp.fc2",
    )


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
        shared_inputs=("position_bias",),
    ),
    _vit(),
)
