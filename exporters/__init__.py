"""Torch modules to engine-ready ONNX files, with parity checks. A leaf: it imports nothing from ziplm_deploy."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

from exporters.encoder import ExportError, ExportSettings, dummy_inputs, export_encoder, input_names
from exporters.heads import EmbeddingModel
from exporters.integer_matmul import to_integer_matmul
from exporters.parity import ParityMismatch, check_parity

__all__ = [
    "EmbeddingModel",
    "ExportError",
    "ExportSettings",
    "ParityMismatch",
    "check_parity",
    "dummy_inputs",
    "export_encoder",
    "input_names",
    "to_integer_matmul",
]
