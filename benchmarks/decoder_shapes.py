"""Shapes of causal language models that several programs measure, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from exporters import ExportSettings
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.models.deployed import FLOAT32, CacheForm, Treatment, write_graph

OUTPUTS = ("logits",)


def gpt2() -> PretrainedConfig:
    """GPT-2, 124 million parameters."""
    return GPT2Config()


def smollm2() -> PretrainedConfig:
    """SmolLM2-135M: nine query heads read three cached ones; embedding and head are one matrix."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def tiny() -> PretrainedConfig:
    """Small enough for a test of a program."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


SHAPES = {"gpt2-124m": gpt2, "smollm2-135m": smollm2, "tiny-llama": tiny}


def dense_decoder(shape: str, seed: int = 0) -> nn.Module:
    """A causal language model of this shape, random weights, evaluation mode."""
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(SHAPES[shape](), attn_implementation="eager")
    return as_linears(model.eval())


def export_decoder(
    model: nn.Module, path: Path, settings: ExportSettings, form: CacheForm, treatment: Treatment = FLOAT32
) -> Path:
    """The ONNX file of ``model`` with a cache, as a treatment makes it; returns ``path``."""
    inputs = write_graph(treatment.prepare(model), path, list(OUTPUTS), settings, form)
    treatment.finish(path, inputs)
    return path
