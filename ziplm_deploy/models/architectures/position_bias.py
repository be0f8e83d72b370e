"""A bias of attention scores by distance and head that all layers share: MPNet's and T5's.

T5 of transformers keeps its table in the first layer, which computes the bias and hands it on. Here the stack computes
it, so that the first layer can lose heads, or all attention, like any other; tensors keep their names.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

_TABLE = "relative_attention_bias"  # of the first layer's attention


class HeadsOfBias(nn.Module):
    """What an attention class needs to keep fewer heads: the shared bias ``[.., heads, q, k]`` is cut to those.

    It stands in front of the class of transformers: ``class Sliced(HeadsOfBias, Attention)``.
    """

    kept_heads: Tensor  # int64 [k], buffer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # By name: versions of transformers have other arguments in front of position_bias.
        call = inspect.signature(super().forward).bind(*args, **kwargs)
        position_bias: Tensor | None = call.arguments.get("position_bias")
        if position_bias is not None:
            call.arguments["position_bias"] = position_bias.index_select(1, self.kept_heads)  # [.., k, q, k_len]
        return super().forward(*call.args, **call.kwargs)


class HeadSlicedT5Attention(HeadsOfBias, T5Attention):
    """T5 attention with fewer heads."""


class DroppedT5Attention(nn.Module):
    """A dropped attention block of T5: its bias ``[hidden]``, and the table that the first layer holds for all."""

    def __init__(self, bias: Tensor, block: nn.Module) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())
        if _TABLE in block._modules:
            self.add_module(_TABLE, block.get_submodule(_TABLE))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        return self.bias, None, None


class SharedBiasT5Stack(T5Stack):  # type: ignore[no-untyped-call, unused-ignore]
    """T5's encoder, which computes position bias and mask once for all layers; only without a decoder."""

    bucket_of_distance: Tensor  # int64 [2 * farthest + 1], buffer
    bias_table: tuple[nn.Embedding]  # of the first layer, which may have been replaced; no sub-module of its own

    def forward(  # type: ignore[override, unused-ignore]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states ``[batch, length, hidden]``, as transformers gives them; no attentions."""
        hidden = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        bias = self._bias(hidden, attention_mask)
        states = [hidden]
        for layer in self.block:
            hidden = layer(hidden, position_bias=bias)[0]
            states.append(hidden)
        hidden = self.dropout(self.final_layer_norm(hidden))
        states[-1] = hidden
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None)

    def _bias(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What scores add, ``[1 or batch, heads, length, length]``: by distance, and for keys that are padding."""
        length, farthest = hidden.size(1), self.bucket_of_distance.size(0) // 2
        positions = torch.arange(length, device=hidden.device)
        distances = (positions[None] - positions[:, None]).clamp(-farthest, farthest)  # [length, length]
        # Traced as a constant: a stack without layers, as tables time it, has no module of its own for the parameter.
        traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        table = self.bias_table[0].weight.data if traced else self.bias_table[0].weight
        by_distance = table[self.bucket_of_distance].T  # [heads, 2 * farthest + 1]
        bias = by_distance[:, distances + farthest][None]  # [1, heads, length, length]
        if attention_mask is None:
            return bias
        padding = (1 - attention_mask[:, None, None, :].to(bias.dtype)) * torch.finfo(bias.dtype).min
        return bias + padding


def share_bias(model: nn.Module) -> None:
    """Change a T5 encoder, just built, to :class:`SharedBiasT5Stack`; answers and tensors stay."""
    stack: Any = model.base_model.encoder  # type: ignore[union-attr]
    attention: Any = stack.block[0].layer[0].SelfAttention
    farthest: int = attention.relative_attention_max_distance  # all beyond it are in the last bucket
    buckets = attention._relative_position_bucket(
        torch.arange(-farthest, farthest + 1),
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=farthest,
    )
    stack.__class__ = SharedBiasT5Stack
    stack.register_buffer("bucket_of_distance", buckets, persistent=False)
    stack.bias_table = (attention.relative_attention_bias,)
