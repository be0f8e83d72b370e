"""Torch modules to engine-ready ONNX and GGUF files, with parity checks. A leaf: it imports nothing of the rest.

Everything in ``__all__`` is imported when it is first asked for: files are written and named without torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

if TYPE_CHECKING:
    from exporters.causal_encoder import EmbeddingHead, ScoreHead, export_causal_encoder
    from exporters.decoder import DecoderExportSettings, export_decoder
    from exporters.decoder_cache import CachedLayer, cache_arrays, cached_layers
    from exporters.decoder_parity import check_decoder_parity
    from exporters.encoder import (
        ExportError,
        ExportSettings,
        dummy_inputs,
        export_encoder,
        input_names,
        max_tokens,
    )
    from exporters.genai import SpecialTokens, write_genai_config
    from exporters.gguf import GgufSettings, export_gguf
    from exporters.heads import EmbeddingModel, ImageEmbeddingModel
    from exporters.integer_matmul import to_integer_matmul
    from exporters.nbits_matmul import to_nbits_matmul
    from exporters.parity import ParityMismatch, check_parity

__all__ = [
    "CachedLayer",
    "DecoderExportSettings",
    "EmbeddingHead",
    "EmbeddingModel",
    "ExportError",
    "ExportSettings",
    "GgufSettings",
    "ImageEmbeddingModel",
    "ParityMismatch",
    "ScoreHead",
    "SpecialTokens",
    "cache_arrays",
    "cached_layers",
    "check_decoder_parity",
    "check_parity",
    "dummy_inputs",
    "export_causal_encoder",
    "export_decoder",
    "export_encoder",
    "export_gguf",
    "input_names",
    "max_tokens",
    "to_integer_matmul",
    "to_nbits_matmul",
    "write_genai_config",
]

_HOMES = {
    "causal_encoder": ("EmbeddingHead", "ScoreHead", "export_causal_encoder"),
    "decoder": ("DecoderExportSettings", "export_decoder"),
    "decoder_cache": ("CachedLayer", "cache_arrays", "cached_layers"),
    "decoder_parity": ("check_decoder_parity",),
    "encoder": ("ExportError", "ExportSettings", "dummy_inputs", "export_encoder", "input_names", "max_tokens"),
    "genai": ("SpecialTokens", "write_genai_config"),
    "gguf": ("GgufSettings", "export_gguf"),
    "heads": ("EmbeddingModel", "ImageEmbeddingModel"),
    "integer_matmul": ("to_integer_matmul",),
    "nbits_matmul": ("to_nbits_matmul",),
    "parity": ("ParityMismatch", "check_parity"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
