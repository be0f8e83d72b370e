"""Pruned causal language models of the Llama kind as GGUF, for llama.cpp (``llama-cli -m model.gguf -p "…"``).

llama.cpp builds most models from one head count and one feed-forward width. Its arch ``deci`` reads both layer by
layer: RMSNorm before each block, full rotary positions, grouped queries, a gated feed-forward with SiLU, any biases.
Models built of other parts are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.decoder_parts import DecoderParts
from exporters.gguf_checks import ARCHITECTURE, check_parts, check_types, head_size
from exporters.gguf_file import FileTensor, FileType, gguf_package, in_float16, matrix, vector, write_gguf
from exporters.gguf_layers import FileLayer, file_layers, layer_tensors, rotary_keys
from exporters.gguf_tokenizer import TokenizerSource, tokenizer_keys


@dataclass(frozen=True)
class GgufSettings:
    """What a GGUF file is to be like.

    Attributes:
        name: what llama.cpp calls the model.
        file_type: of the matrices in the layers.
        head_type: of the embedding and the head; by default Q8_0 under Q4_0, as llama.cpp's own quantizer keeps them at
            six or eight bits there, and else ``file_type``.
        pre_tokenizer: llama.cpp's name of how the tokenizer splits text (``tokenizer.ggml.pre``), where it cannot be
            told from the tokenizer.
    """

    name: str
    file_type: FileType = "F16"
    head_type: FileType | None = None
    pre_tokenizer: str | None = None

    @property
    def type_of_head(self) -> FileType:
        """The type that embedding and head are written in."""
        return self.head_type or ("Q8_0" if self.file_type == "Q4_0" else self.file_type)


def export_gguf(
    parts: DecoderParts, path: Path, tokenizer_source: TokenizerSource, settings: GgufSettings
) -> tuple[str, ...]:
    """Write a model to one GGUF file; it appears whole or not at all.

    Dropped blocks are left out, or written as zeros where the format wants them; their constants go into the bias of
    the block before them. llama.cpp's answers are the model's own up to the types of weights and cache.

    Args:
        parts: the model.
        path: the file.
        tokenizer_source: a GGUF file whose tokenizer is copied, a folder with ``tokenizer.json``, or a fast tokenizer
            of transformers; None for a file that is only timed.
        settings: name and types.

    Returns:
        Names of tensors that stay in float16 although another type was asked for: their rows are no multiple of 32.

    Raises:
        ExportError: the model has a part that the format cannot hold, the tokenizer cannot be written, a weight is not
            finite, or the package ``gguf`` is missing.
        OSError: the file cannot be written.
    """
    check_types(settings.file_type, settings.type_of_head)
    check_parts(parts)
    write_tokenizer = tokenizer_keys(tokenizer_source, parts.embedding.shape[0], settings.pre_tokenizer)
    head_dim = head_size(parts)
    layers = file_layers(parts.layers, parts.embedding.shape[1], head_dim)

    def metadata(writer: Any) -> None:
        _model_keys(writer, parts, layers, head_dim, settings)
        write_tokenizer(writer)

    tensors = list(_tensors(parts, layers, settings))
    write_gguf(path, ARCHITECTURE, metadata, tensors)
    return () if settings.file_type == settings.type_of_head == "F16" else in_float16(tensors)


def _tensors(parts: DecoderParts, layers: list[FileLayer], settings: GgufSettings) -> Iterator[FileTensor]:
    assert parts.rotary is not None  # checked before
    vocabulary, hidden = parts.embedding.shape
    head_type = settings.type_of_head
    yield matrix("token_embd.weight", (vocabulary, hidden), head_type, lambda: parts.embedding)
    _, factors = rotary_keys(parts.rotary)
    if factors is not None:
        yield vector("rope_freqs.weight", factors)
    for index, layer in enumerate(layers):
        yield from layer_tensors(index, layer, hidden, settings.file_type, parts.rotary.scale**2)
    yield vector("output_norm.weight", parts.final_norm.weight)
    if parts.head is not None:
        head = parts.head.weight
        yield matrix("output.weight", (vocabulary, hidden), head_type, lambda: head)


def _model_keys(
    writer: Any, parts: DecoderParts, layers: list[FileLayer], head_dim: int, settings: GgufSettings
) -> None:
    gguf = gguf_package()
    assert parts.rotary is not None  # checked before
    attention = [layer.attention for layer in layers]
    writer.add_name(settings.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{settings.file_type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(parts.embedding.shape[0])
    writer.add_context_length(parts.max_positions)
    writer.add_embedding_length(parts.embedding.shape[1])
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([layer.width for layer in layers])
    writer.add_head_count([part.n_heads if part else 0 for part in attention])
    writer.add_head_count_kv([part.n_kv_heads if part else 0 for part in attention])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rotary_keys(parts.rotary)[0])
    writer.add_layer_norm_rms_eps(parts.final_norm.epsilon)
