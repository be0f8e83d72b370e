"""A tiny exported classifier for neural-compressor, with calibration batches and the call that quantizes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from exporters import ExportSettings, export_encoder
from tests.helpers.int8_files import settings_of
from tests.helpers.models import tiny_inputs, tiny_model
from ziplm_deploy.compression.int8.neural_compressor import NeuralCompressorResult, quantize_with_neural_compressor
from ziplm_deploy.compression.int8.quantize import linear_ranges
from ziplm_deploy.recipe import Int8Config

BATCH, TOKENS, N_LINEARS = 2, 9, 18
STATIC, DYNAMIC = Int8Config(method="static"), Int8Config(method="dynamic")


def export(path: Path, model: torch.nn.Module | None = None) -> Path:
    model = model or tiny_model("bert", "text-classification")
    inputs = tiny_inputs(model, BATCH, TOKENS)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    export_encoder(model, inputs, ["logits"], path, ExportSettings(opset=16, shapes="static"))
    return path


def partly_zero(path: Path) -> Path:
    """A model that also has a linear without weights and one with an output without any."""
    model = tiny_model("bert", "text-classification")
    model.get_parameter("bert.encoder.layer.0.output.dense.weight").data.zero_()
    model.get_parameter("bert.encoder.layer.1.output.dense.weight").data[3] = 0.0
    return export(path, model)


def make_batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    shape = (BATCH, TOKENS)
    return [
        {
            "input_ids": generator.integers(5, 19, shape),
            "attention_mask": np.ones(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
            "labels": np.zeros(BATCH, np.int64),  # not an input of the model
        }
        for _ in range(count)
    ]


def answers(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {entry.name: batch[entry.name] for entry in session.get_inputs()})[0]


def run(source: Path, target: Path, config: Int8Config = STATIC, **settings: Any) -> NeuralCompressorResult:
    if config.method == "static" and "ranges" not in settings:
        settings["ranges"] = linear_ranges(source, make_batches(), config)
    settings = {"evaluate": None, **settings}
    return quantize_with_neural_compressor(source, target, settings_of(config), **settings)
