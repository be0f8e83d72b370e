"""The towers of CLIP and SigLIP, one entry each: pre-LN encoders of texts or of images.

A tower is a model of its own. Before transformers 5 moved its layers up, they stood below one more module.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

from ziplm_deploy.models.architectures.base import Architecture


class HeadSlicedTowerAttention(nn.Module):
    """Attention of a tower with fewer heads, which transformers 4 would lay out as all of them."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    head_dim: int
    scale: float
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        def by_head(linear: nn.Linear) -> Tensor:
            states: Tensor = linear(hidden_states)
            return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)  # [batch, heads, length, dim]

        scores = by_head(self.q_proj) @ by_head(self.k_proj).transpose(-1, -2) * self.scale  # [batch, heads, q, k]
        for mask in (attention_mask, causal_attention_mask):
            scores = scores if mask is None else scores + mask
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        shares = nn.functional.dropout(shares, p=self.dropout, training=self.training)
        context = (shares @ by_head(self.v_proj)).transpose(1, 2).flatten(2)  # [batch, length, heads * head_dim]
        return self.out_proj(context), shares if output_attentions else None


def _tower(model_type: str, home: str) -> Architecture:
    """Entry of a tower whose layers are in the module ``home`` (empty: in the base model itself)."""
    return Architecture(
        model_type,
        layers=".".join(filter(None, (home, "encoder.layers"))),
        attention="self_attn",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        head_count="num_heads",
        head_width="embed_dim",
        attention_output="self_attn.out_proj",
        ffn="mlp",
        ffn_input="fc1",
        ffn_output="mlp.fc2",
        ffn_residual="layer_norm2",
        attention_norm="layer_norm1",
        ffn_norm="layer_norm2",
    )


def _towers(kind: str, modeling: object) -> tuple[Architecture, Architecture]:
    """Entries of texts and images, for the release of transformers that is here."""
    older = any(hasattr(modeling, name) for name in ("CLIPTextTransformer", "SiglipTextTransformer"))
    text, image = (_tower(f"{kind}_{what}_model", f"{what}_model" if older else "") for what in ("text", "vision"))
    if kind == "siglip":  # an auto class knows whole models only
        text = replace(text, model_classes={"AutoModel": "SiglipTextModel"}, in_optimum=False)
    if not older:
        return text, image
    return tuple(replace(entry, sliced_attention=HeadSlicedTowerAttention) for entry in (text, image))  # type: ignore[return-value]


# transformers 4 has no configuration of SigLIP's texts by its name.
TOWERS = tuple(
    entry
    for entry in (*_towers("clip", modeling_clip), *_towers("siglip", modeling_siglip))
    if entry.model_type in CONFIG_MAPPING
)

# Models that hold two towers, and the settings of each; a task takes the tower that reads what its data hold.
WHOLE = {
    kind: {"text": ("text_config", f"{kind}_text_model"), "image": ("vision_config", f"{kind}_vision_model")}
    for kind in ("clip", "siglip")
}
