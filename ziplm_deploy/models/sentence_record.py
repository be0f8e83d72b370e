"""The record of what a sentence-transformers model says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ziplm_deploy.models.sentence_dense import DenseLayer
from ziplm_deploy.recipe import Pooling, Similarity


@dataclass(frozen=True)
class SentenceModules:
    """What a model says; None where it does not."""

    source: str = ""  # folder or hub id, for messages
    pooling: Pooling | None = None
    normalize: bool | None = None
    prompt: str | None = None  # put before every text by default
    query_prompt: str | None = None  # put before queries, and the next before passages
    passage_prompt: str | None = None
    dimensions: tuple[int, ...] | None = None  # sizes that embeddings may be cut to
    truncated: int | None = None  # numbers of an embedding that sentence-transformers keeps by default
    similarity: Similarity | None = None
    include_prompt: bool = True  # whether the tokens of a prompt are pooled, too
    transformer: str = ""  # sub-folder of the transformers model: old ones have it in 0_Transformer
    width: int | None = None  # of the vectors that are pooled
    dense: tuple[DenseLayer, ...] = ()  # after pooling
    dense_folders: tuple[str, ...] = ()  # where their weights are
    max_seq_length: int | None = None  # tokens
    do_lower_case: bool = False
    activation: str | None = None  # over the score of a cross-encoder; full name of a class of torch
    instruction: str | None = None  # of a causal reranker: what its prompt asks for by default
    answer_ids: tuple[int, ...] = ()  # of one that is a language model: tokens of yes and perhaps of no
    is_tower: bool = False  # CLIP's: with its projection as a Dense layer, the weights in its own file

    def answers(self, seq_len: int) -> dict[str, Any]:
        """What changes answers beside the settings of the recipe, for content keys; empty for a plain model."""
        found: dict[str, Any] = {}
        if self.max_seq_length is not None and self.max_seq_length < seq_len:
            found["max_seq_length"] = self.max_seq_length
        if self.do_lower_case:
            found["do_lower_case"] = True
        if self.dense:
            found["dense_layers"] = [layer.model_dump() for layer in self.dense]
        return found
