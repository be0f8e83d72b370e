"""From a torch model to the GGUF file that llama.cpp runs, beside ONNX files or in place of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters import ExportError, GgufSettings, export_gguf
from exporters.decoder_parts import FeedForwardPart
from exporters.gguf_file import BLOCK
from exporters.gguf_tokenizer import TokenizerSource
from ziplm_deploy.errors import StorageError, UnsupportedModelError
from ziplm_deploy.models.causal_parts import causal_parts
from ziplm_deploy.models.deployed import Treatment
from ziplm_deploy.models.gguf_source import gguf_package
from ziplm_deploy.recipe import GgufType, Variant


def gguf_treatment(file_type: GgufType) -> Treatment:
    """How a model becomes a file where llama.cpp serves: nothing is done to it but the export."""
    head = GgufSettings("", file_type).type_of_head
    return Treatment(
        Variant.GGUF,
        prepare=lambda model: model,
        finish=lambda path, inputs: None,
        description=f"{file_type} weights, {head} embedding and head",
        gguf_type=file_type,
    )


def write_to_be_timed(model: nn.Module, path: Path, file_type: GgufType) -> None:
    """Write a causal language model with tokens that mean nothing: for timing, not for text.

    Raises:
        UnsupportedModelError: no causal language model.
        ExportError: the format cannot hold it, or the package ``gguf`` is missing.  OSError: it cannot be written.
    """
    export_gguf(causal_parts(model), path, None, GgufSettings("to be timed", file_type))


def rounded(model: nn.Module, file_type: GgufType) -> nn.Module:
    """A copy of a causal language model whose matrices have the values that a file of this type has of them."""
    gguf = gguf_package()
    head_type = GgufSettings("", file_type).type_of_head
    copied: Any = copy.deepcopy(model)
    vocabularies = {id(part.weight) for part in (copied.get_input_embeddings(), copied.get_output_embeddings())}
    blocks = (layer.feed_forward for layer in causal_parts(copied).layers)
    filled_up = {block.down.weight.data_ptr() for block in blocks if isinstance(block, FeedForwardPart)}
    with torch.no_grad():
        for matrix in (parameter for parameter in copied.parameters() if parameter.ndim == 2 and parameter.numel()):
            named = head_type if id(matrix) in vocabularies else file_type
            missing = -matrix.shape[1] % BLOCK if matrix.data_ptr() in filled_up else 0  # the file has zeros there
            values = np.pad(matrix.detach().float().cpu().numpy(), ((0, 0), (0, missing)))
            kind = gguf.GGMLQuantizationType[named if values.shape[1] % BLOCK == 0 else "F16"]
            found = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            matrix.copy_(torch.from_numpy(found[:, : matrix.shape[1]]))
    return copied  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GgufExport:
    """How a recipe's models become GGUF files, with weights of one type and the tokenizer of the dense model."""

    name: str  # of the family
    file_type: GgufType
    tokenizer: TokenizerSource

    def write(self, model: nn.Module, path: Path, name: str) -> tuple[str, ...]:
        """Export ``model`` to ``path``; names of the tensors that stay in float16, as their rows fill no blocks.

        Raises:
            UnsupportedModelError: the format cannot hold the model or its tokenizer.
            StorageError: the file cannot be written.
        """
        return self._write(model, path, name, self.tokenizer)

    def write_to_be_timed(self, model: nn.Module, path: Path, name: str) -> None:
        """Export ``model`` as fast as it will be, with tokens that mean nothing; raises as :meth:`write`."""
        self._write(model, path, name, None)

    def _write(self, model: nn.Module, path: Path, name: str, tokenizer: TokenizerSource) -> tuple[str, ...]:
        settings = GgufSettings(f"{self.name} {name}", self.file_type)
        try:
            return export_gguf(causal_parts(model), path, tokenizer, settings)
        except ExportError as error:
            raise UnsupportedModelError(f"{name}: {error}") from error
        except OSError as error:
            raise StorageError(
                f"expected to write {path}, found: {error.strerror or error}; free disk space or choose another "
                "output_dir"
            ) from error
