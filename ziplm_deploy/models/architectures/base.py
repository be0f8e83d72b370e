"""Attribute paths of one kind of model: where its layers are, and in a layer its blocks and their linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ziplm_deploy.models.shape import ModuleKind


@dataclass(frozen=True)
class Architecture:
    """Attribute paths of one ``model_type``; the defaults are BERT's. Paths are relative to a layer.

    ``ffn`` is the smallest block that owns the first FFN linear.
    """

    model_type: str
    layers: str = "encoder.layer"  # relative to the base model
    attention: str = "attention.self"  # owns query, key, value and the head count
    query: str = "query"  # relative to `attention`
    key: str = "key"
    value: str = "value"
    head_count: str = "num_attention_heads"  # attributes of `attention` that its views use
    head_width: str | None = "all_head_size"
    attention_output: str = "attention.output.dense"
    ffn: str = "intermediate"
    ffn_input: str = "dense"  # relative to `ffn`
    ffn_output: str = "output.dense"
    ffn_residual: str = "intermediate"  # its first input is what the FFN's output is added to
    attention_norm: str | None = None  # LayerNorm before the block (pre-LN): nobody reads it if the block is dropped
    ffn_norm: str | None = None
    config_layers: str = "num_hidden_layers"
    config_ffn_width: str = "intermediate_size"
    sliced_attention: type[nn.Module] | None = None  # class of an attention block with fewer heads
    shared_input: str | None = None  # argument of every layer that the model computes once for all of them

    def block(self, kind: ModuleKind) -> str:
        """Path of the block that is replaced when a module of this kind shrinks."""
        return self.attention if kind == "attention" else self.ffn

    def output(self, kind: ModuleKind) -> str:
        """Path of the linear whose columns are pruned: attention output projection or second FFN linear."""
        return self.attention_output if kind == "attention" else self.ffn_output

    def norm(self, kind: ModuleKind) -> str | None:
        """Path of the LayerNorm that only this kind of module reads; ``None`` in post-LN models."""
        return self.attention_norm if kind == "attention" else self.ffn_norm

    def output_in_block(self, kind: ModuleKind) -> str | None:
        """Path of the output linear relative to the block, or ``None`` if it lies outside of it."""
        prefix = self.block(kind) + "."
        output = self.output(kind)
        return output.removeprefix(prefix) if output.startswith(prefix) else None
