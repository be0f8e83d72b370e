"""Disentangled attention, of DeBERTa v2 and v3, by distances instead of by pairs of tokens.

Scores of a query i and a key j add, to their product, that of the query with a key of their distance (c2p)
and that of the key with a query of it (p2c)::

    A[i, j] = (q_i · k_j + q_i · K[i - j] + k_j · Q[i - j]) / sqrt(d · terms)

transformers multiplies with every row of K and Q and gathers, for each head, one of them for each pair of tokens, by
indices ``[length, length]``. Here it multiplies with one row a distance, and pairs are read off by shifting rows
(:func:`_by_pair`, as in Dai et al. 2019, Transformer-XL, appendix B): no gathered elements, and fewer products for
texts shorter than there are rows. K and Q depend on weights only: an exported file holds them as constants, and it
holds no position embeddings, LayerNorm of those, buckets or indices.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # transformers 4 uses torch.jit.script
    from transformers.models.deberta_v2.modeling_deberta_v2 import (
        DebertaV2Encoder,
        DisentangledSelfAttention,
        make_log_bucket_position,
    )


class DistanceAttention(DisentangledSelfAttention):
    """DeBERTa's attention by distances; its tensors and answers are those of transformers.

    Rows of ``K`` and ``Q`` are computed by the projections' weights, past the modules: what watches or quantizes the
    linears of a layer sees tokens only.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Context ``[batch, length, heads * d]``, and the probabilities if asked for.

        Args:
            hidden_states: ``[batch, length, hidden]``.
            attention_mask: as :meth:`DistanceEncoder.get_attention_mask` gives it.
            relative_pos: as :meth:`DistanceEncoder.get_rel_pos` gives it.
            rel_embeddings: ``[2 * span, hidden]``, normalized.
        """
        scale = math.sqrt(self.attention_head_size * (1 + len({"c2p", "p2c"} & set(self.pos_att_type))))
        query = self._by_head(self.query_proj(hidden_states if query_states is None else query_states)) / scale
        key = self._by_head(self.key_proj(hidden_states))  # [batch, heads, length, d]
        value = self._by_head(self.value_proj(hidden_states))
        scores = query @ key.transpose(-1, -2)  # [batch, heads, length, length]
        if self.relative_attention:
            assert relative_pos is not None  # as the encoder gives it
            rows = self.pos_dropout(rel_embeddings)
            if "c2p" in self.pos_att_type:
                projection = self.key_proj if self.share_att_key else self.pos_key_proj
                scores = scores + _by_pair(query @ self._by_distance(projection, rows, relative_pos[0]))
            if "p2c" in self.pos_att_type:
                projection = self.query_proj if self.share_att_key else self.pos_query_proj
                queries = self._by_distance(projection, rows, relative_pos[1], scale)
                scores = scores + _by_pair(key @ queries).transpose(-1, -2)
        probabilities = self.dropout(torch.softmax(scores + attention_mask, dim=-1))
        context = (probabilities @ value).transpose(1, 2)  # [batch, length, heads, d]
        context = context.reshape(*context.shape[:2], self.all_head_size)
        return context, probabilities if output_attentions else None

    def _by_head(self, x: Tensor) -> Tensor:
        """``[batch, heads, length, d]`` of ``[batch, length, heads * d]``."""
        return x.reshape(*x.shape[:2], self.num_attention_heads, self.attention_head_size).transpose(1, 2)

    def _by_distance(self, projection: nn.Linear, rows: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
        """One vector a distance, ``[heads, d, 2 * length]``, over ``scale``."""
        projected = nn.functional.linear(rows, projection.weight, projection.bias) / scale  # [2 * span, heads * d]
        by_head = projected.reshape(-1, self.num_attention_heads, self.attention_head_size).transpose(0, 1)
        return by_head.index_select(1, index).transpose(1, 2)


class DistanceEncoder(DebertaV2Encoder):
    """DeBERTa's encoder, which gives :class:`DistanceAttention` what it reads, once for all layers."""

    distance_rows: Tensor  # int64 [2, 2 * positions], buffer

    def get_rel_pos(self, hidden_states: Tensor, query_states: Any = None, relative_pos: Any = None) -> Tensor | None:
        """Row of the position embeddings for each distance ``length - 1 … -length``, int64 ``[2, 2 * length]``.

        First for keys of distances, then for queries. The last distance is no token's: see :func:`_by_pair`.
        """
        if not self.relative_attention:
            return None
        length, rows = hidden_states.size(1), self.distance_rows
        if length > rows.size(1) // 2:
            rows = _distance_rows(self, length).to(rows.device)
        middle = rows.size(1) // 2
        return rows[:, middle - length : middle + length]

    def get_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """What scores add, ``[batch, 1, length, length]``: 0, or the smallest number where either token is padding."""
        pairs: Tensor = super().get_attention_mask(attention_mask)  # type: ignore[no-untyped-call]
        dtype = next(self.parameters()).dtype
        return (1 - pairs.to(dtype)) * torch.finfo(dtype).min


def _by_pair(products: Tensor) -> Tensor:
    """``[..., i, j] = products[..., i, length - 1 - i + j]`` of ``[batch, heads, length, 2 * length]``.

    Without the first ``length - 1`` values and the last, in rows that are one shorter, each row starts one earlier than
    the row above. Rows of ``2 * length - 1`` distances would do, but not for one token: they would be left empty.
    """
    batch, heads, length, width = products.shape
    values = products.reshape(batch, heads, -1)[..., length - 1 : -1]  # [batch, heads, length * (width - 1)]
    return values.reshape(batch, heads, length, width - 1)[..., :length]


def _distance_rows(encoder: DebertaV2Encoder, positions: int) -> Tensor:
    """Rows of the position embeddings for distances ``positions - 1 … -positions``, int64 ``[2, 2 * positions]``."""
    distances = torch.arange(positions - 1, -positions - 1, -1)
    if encoder.position_buckets > 0:
        distances = make_log_bucket_position(distances, encoder.position_buckets, encoder.max_relative_positions).long()
    span = encoder.rel_embeddings.num_embeddings // 2
    return torch.stack([distances + span, span - distances]).clamp(0, 2 * span - 1)


def read_by_distance(model: nn.Module) -> None:
    """Change the attention of a DeBERTa model, just built, to :class:`DistanceAttention`; answers and tensors stay."""
    encoder: Any = model.base_model.encoder  # type: ignore[union-attr]
    encoder.__class__ = DistanceEncoder
    if encoder.relative_attention:
        rows = _distance_rows(encoder, model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        encoder.register_buffer("distance_rows", rows, persistent=False)
    for layer in encoder.layer:
        layer.attention.self.__class__ = DistanceAttention
