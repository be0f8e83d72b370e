"""Attribute paths of one kind of model: where its layers are, and in a layer its blocks and their linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ziplm_deploy.models.shape import ModuleKind

# Rows of one linear for query, key and value: all queries, all keys, all values; or so for each head in turn.
Fused = Literal["thirds", "heads"]


@dataclass(frozen=True)
class CausalPaths:
    """Where a causal language model has its embeddings and norms, relative to the base model."""

    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    positions: str | None = None  # learned ones
    first_position: int = 0  # row of `positions` that the first token takes
    rotary: str | None = "rotary_emb"
    query_norm: str | None = None  # relative to `attention`; over each head
    key_norm: str | None = None
    parallel: str | None = None  # setting that has attention and FFN read the same input
    has_window: bool = False  # `sliding_window` of its configuration means something; others keep it as they keep all


@dataclass(frozen=True)
class Architecture:
    """Attribute paths of one ``model_type``; the defaults are BERT's. Paths are relative to a layer.

    ``ffn`` is the smallest block that owns the first FFN linear, or that linear itself (``ffn_input`` is then empty).
    """

    model_type: str
    layers: str = "encoder.layer"  # relative to the base model
    attention: str = "attention.self"  # owns query, key, value and the head count
    query: str = "query"  # relative to `attention`
    key: str = "key"
    value: str = "value"
    fused: Fused | None = None  # one linear, `query`, computes query, key and value: how its rows are ordered
    head_count: str | None = "num_attention_heads"  # attributes of `attention` that its views use
    head_width: str | None = "all_head_size"
    attention_output: str = "attention.output.dense"
    ffn: str = "intermediate"
    ffn_input: str = "dense"  # relative to `ffn`
    ffn_gate: str | None = None  # as well: its row j is multiplied with row j of the first
    ffn_fused: bool = False  # no linear of its own for that: `ffn_input` computes all columns, then all their factors
    ffn_output: str = "output.dense"
    rotates: bool = False  # rotary positions, by whichever name the configuration has for them
    ffn_residual: str = "intermediate"  # its first input is what the FFN's output is added to
    attention_norm: str | None = None  # LayerNorm before the block (pre-LN): nobody reads it if the block is dropped
    ffn_norm: str | None = None
    attention_scale: str | None = None  # module whose `lambda1` [hidden] multiplies what the block adds (layer scale)
    ffn_scale: str | None = None
    config_layers: str = "num_hidden_layers"
    config_ffn_width: str | None = "intermediate_size"
    config_ffn_ratio: str | None = None  # FFN columns a hidden unit, for configurations without a width
    config_kv_heads: str | None = None  # cached heads, each read by several query heads
    position_projections: tuple[str, ...] = ()  # relative to `attention`, where there are: rows of heads, of no token
    causal: CausalPaths | None = None  # causal language models only: what lies outside of the layers
    sliced_attention: type[nn.Module] | None = None  # class of an attention block with fewer heads
    shared_inputs: tuple[str, ...] = ()  # arguments of every layer that the model computes once for all of them
    layer_returns_tuple: bool = True  # asked only of models with those
    sized_embeddings: type[nn.Module] | None = None  # class of `embeddings` whose positions fit images of one size only
    adapt: Callable[[nn.Module], None] | None = None  # of a model just built, in place: the same answers otherwise
    dropped_attention: Callable[[Tensor, nn.Module], nn.Module] | None = None  # of a bias and the old block
    model_classes: Mapping[str, str | None] = field(default_factory=dict)  # for auto classes; None: it has a decoder
    variant: Callable[[Any], Architecture] | None = None  # of a configuration whose layers have other parts
    refused: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # settings whose other values change blocks
    why_refused: Mapping[str, str] = field(default_factory=dict)  # more of those settings, in words
    renamed: Mapping[str, str] = field(default_factory=dict)  # settings of original code, and what they are called now
    in_optimum: bool = True  # a release of transformers that optimum-onnx can be installed with has the type

    @property
    def is_gated(self) -> bool:
        """Whether each column of the FFN takes two rows of weights before its activation."""
        return self.ffn_gate is not None or self.ffn_fused

    def block(self, kind: ModuleKind) -> str:
        """Path of the block that is replaced when a module of this kind shrinks."""
        return self.attention if kind == "attention" else self.ffn

    def output(self, kind: ModuleKind) -> str:
        """Path of the linear whose columns are pruned: attention output projection or second FFN linear."""
        return self.attention_output if kind == "attention" else self.ffn_output

    def norm(self, kind: ModuleKind) -> str | None:
        """Path of the LayerNorm that only this kind of module reads; ``None`` in post-LN models."""
        return self.attention_norm if kind == "attention" else self.ffn_norm

    def scale(self, kind: ModuleKind) -> str | None:
        """Path of the layer scale that only this kind of module goes through; ``None`` where models have none."""
        return self.attention_scale if kind == "attention" else self.ffn_scale

    def output_in_block(self, kind: ModuleKind) -> str | None:
        """Path of the output linear relative to the block, or ``None`` if it lies outside of it."""
        prefix = self.block(kind) + "."
        output = self.output(kind)
        return output.removeprefix(prefix) if output.startswith(prefix) else None
