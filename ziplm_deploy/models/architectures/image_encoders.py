"""The image encoders that can be pruned: ViT and its kin, which normalize before each block.

transformers renames their modules now and then: ViT's and DeiT's in 5.9, DINOv2's after.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers.models.deit import modeling_deit
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.vit import modeling_vit

from ziplm_deploy.models.architectures.base import Architecture


class SizedDinov2Embeddings(modeling_dinov2.Dinov2Embeddings):
    """DINOv2's embeddings for images of one size, whose positions no call interpolates anew; traced graphs did so."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return self.position_embeddings


_OLDER_VIT = Architecture(
    "vit",
    attention="attention.attention",
    ffn_residual="layernorm_after",
    attention_norm="layernorm_before",
    ffn_norm="layernorm_after",
)
_NEWER_VIT = replace(
    _OLDER_VIT,
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


def _dinov2() -> Architecture:
    """DINOv2 with plain FFNs; its layer scales are folded into the linears before them."""
    attention = _OLDER_VIT if hasattr(modeling_dinov2, "Dinov2SelfAttention") else _NEWER_VIT
    return replace(
        attention,
        model_type="dinov2",
        layers="encoder.layer",
        ffn="mlp",
        ffn_input="fc1",
        ffn_output="mlp.fc2",
        ffn_residual="norm2",
        attention_norm="norm1",
        ffn_norm="norm2",
        attention_scale="layer_scale1",
        ffn_scale="layer_scale2",
        config_ffn_width=None,
        config_ffn_ratio="mlp_ratio",
        refused={"use_swiglu_ffn": (False,)},
        sized_embeddings=SizedDinov2Embeddings,
    )


IMAGE_ENCODERS = (
    _NEWER_VIT if hasattr(modeling_vit, "ViTMLP") else _OLDER_VIT,
    replace(_NEWER_VIT if hasattr(modeling_deit, "DeiTMLP") else _OLDER_VIT, model_type="deit"),
    _dinov2(),
)
