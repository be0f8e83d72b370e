"""Model shapes that several programs measure, with random weights: latency does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel

from exporters import ExportSettings, dummy_inputs, export_encoder
from ziplm_deploy.models.deployed import FLOAT32, Treatment

OUTPUTS = ("last_hidden_state",)


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int = 30522


SHAPES = {
    "bert-base": Shape(layers=12, hidden_size=768, heads=12, intermediate_size=3072),
    "minilm-l6": Shape(layers=6, hidden_size=384, heads=12, intermediate_size=1536),
    "tiny": Shape(layers=3, hidden_size=64, heads=4, intermediate_size=256, vocab_size=200),
}


def dense_model(shape: Shape, seed: int = 0) -> nn.Module:
    """A BERT of this shape without pooler, random weights, evaluation mode."""
    torch.manual_seed(seed)
    config = BertConfig(  # type: ignore[no-untyped-call, unused-ignore]
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
    )
    model: nn.Module = BertModel._from_config(config, attn_implementation="eager", add_pooling_layer=False)
    return model.eval()


def export(model: nn.Module, path: Path, settings: ExportSettings, treatment: Treatment = FLOAT32) -> Path:
    """The ONNX file of ``model`` as a treatment makes it, which may change the model in place; returns ``path``."""
    inputs = dummy_inputs(model, settings)
    export_encoder(treatment.prepare(model), inputs, list(OUTPUTS), path, settings)
    treatment.finish(path, inputs)
    return path
