"""Small models of the Llama kind as parts, their answers in plain torch, and those of llama.cpp."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from exporters.decoder_parts import (
    AttentionPart,
    DecoderParts,
    DroppedPart,
    FeedForwardPart,
    LayerPart,
    LinearPart,
    NormPart,
    RotaryPart,
)
from exporters.gguf_file import FileType, matrix, vector, write_gguf
from exporters.gguf_layers import file_layers, layer_tensors
from exporters.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_keys

END, END_ID = "<|end|>", 136  # the first after the bytes and merges
# They tell ways to split text from each other: across digits, spaces and line ends.
MERGES = [("t", "h"), ("th", "e"), ("1", "2"), ("12", "3"), ("Ġ", "t"), ("Ċ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "Ġ")]


def byte_level_tokenizer(pre_tokenizer: str = "gpt-2", start: bool = False) -> Any:
    """Every byte of ASCII, a few merges, an end token that is special and a word that is not.

    llama.cpp's server does not answer with tokens that are no whole characters, so there are none.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {byte_level.pre_tokenize_str(chr(byte))[0][0]: byte for byte in range(128)}
    vocabulary |= {first + second: 128 + index for index, (first, second) in enumerate(MERGES)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, ignore_merges=pre_tokenizer == "llama-bpe"))
    described = json.loads(backend.to_str())
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre_tokenizer]}
    backend = Tokenizer.from_str(json.dumps(described))
    backend.decoder = decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend, eos_token=END, pad_token=END, bos_token=END)
    tokenizer.add_tokens(["<word>"])
    if start:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, END_ID)]
        )
    return tokenizer


SPACES = {
    "prepended": lambda backend: setattr(
        backend, "normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "always": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace("▁", "always", False)),
    "never": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace("▁", "never", False)),
}


def sentencepiece_like(spaces: str) -> Any:
    """Tokens as Llama 2 orders them: special ones, bytes, merged ones in the order of their scores, characters."""
    merged = ["▁t", "he", "▁a", "▁the", "in", "an", "and", "▁▁", "▁and", "ing", "thing", "▁▁▁▁"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *"▁theinagd.,!"]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    pairs = [(text[:cut], text[cut:]) for text in merged for cut in range(1, len(text))]
    merges = [(first, second) for first, second in pairs if first in vocabulary and second in vocabulary]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    SPACES[spaces](backend)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_llama(model_type: str = "llama", **changes: Any) -> Any:
    """3 layers, hidden 64, 4 heads of 32 on 2 cached ones, FFN 96; weights of size 1 / root of inputs, in float16."""
    config = transformers.AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "vocab_size": 144,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            **changes,
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                values = 1 + values / 4
            elif weight.ndim == 2:
                values = values / weight.shape[1] ** 0.5
            weight.copy_(values.half())
    return model


def parts_of(model: Any) -> DecoderParts:
    """A Llama or Qwen2 of transformers as parts."""
    config = model.config
    inner = model.model
    epsilon = config.rms_norm_eps

    def linear(module: Any) -> LinearPart:
        return LinearPart(module.weight.detach(), None if module.bias is None else module.bias.detach())

    def norm(module: Any) -> NormPart:
        return NormPart("rms", module.weight.detach(), epsilon)

    def layer(module: Any) -> LayerPart:
        block, mlp = module.self_attn, module.mlp
        heads, cached = config.num_attention_heads, config.num_key_value_heads
        attention = AttentionPart(
            linear(block.q_proj),
            linear(block.k_proj),
            linear(block.v_proj),
            linear(block.o_proj),
            heads,
            cached,
            block.head_dim,
            block.head_dim**-0.5,
        )
        feed_forward = FeedForwardPart(linear(mlp.up_proj), linear(mlp.down_proj), "silu", linear(mlp.gate_proj))
        return LayerPart(norm(module.input_layernorm), attention, norm(module.post_attention_layernorm), feed_forward)

    rotary = inner.rotary_emb
    return DecoderParts(
        inner.embed_tokens.weight.detach(),
        None,
        tuple(layer(module) for module in inner.layers),
        norm(inner.norm),
        None if config.tie_word_embeddings else linear(model.lm_head),
        RotaryPart(rotary.inv_freq, rotary.attention_scaling),
        config.max_position_embeddings,
    )


def cut_heads(layer: LayerPart, kept: Sequence[int]) -> LayerPart:
    """The layer with these cached heads and their query heads only."""
    part = layer.attention
    assert isinstance(part, AttentionPart)
    size = part.head_dim
    group = part.n_heads // part.n_kv_heads
    cached = torch.tensor([head * size + i for head in kept for i in range(size)])
    asking = torch.tensor([(head * group + j) * size + i for head in kept for j in range(group) for i in range(size)])
    attention = dataclasses.replace(
        part,
        query=_rows(part.query, asking),
        key=_rows(part.key, cached),
        value=_rows(part.value, cached),
        output=LinearPart(part.output.weight[:, asking], part.output.bias),
        n_heads=group * len(kept),
        n_kv_heads=len(kept),
    )
    return dataclasses.replace(layer, attention=attention)


def cut_columns(layer: LayerPart, width: int) -> LayerPart:
    """The layer with the first ``width`` columns of its feed-forward block."""
    part = layer.feed_forward
    assert isinstance(part, FeedForwardPart)
    kept = torch.arange(width)
    feed_forward = dataclasses.replace(
        part,
        up=_rows(part.up, kept),
        gate=None if part.gate is None else _rows(part.gate, kept),
        down=LinearPart(part.down.weight[:, :width], part.down.bias),
    )
    return dataclasses.replace(layer, feed_forward=feed_forward)


def constant(seed: int, hidden: int = 64) -> DroppedPart:
    """A dropped block that leaves a constant."""
    return DroppedPart(torch.randn(hidden, generator=torch.Generator().manual_seed(seed)))


def _rows(part: LinearPart, rows: Tensor) -> LinearPart:
    return LinearPart(part.weight[rows], None if part.bias is None else part.bias[rows])


def log_probabilities(parts: DecoderParts, ids: Sequence[int]) -> Tensor:
    """Of the next token, ``[vocabulary]``, in plain torch and float32."""
    stream = parts.embedding[list(ids)].float()  # [tokens, hidden]
    for layer in parts.layers:
        if isinstance(layer.attention, AttentionPart):
            stream = stream + _attention(parts, layer.attention, _norm(layer.attention_norm, stream))
        elif layer.attention.bias is not None:
            stream = stream + layer.attention.bias
        if isinstance(layer.feed_forward, FeedForwardPart):
            stream = stream + _feed_forward(layer.feed_forward, _norm(layer.feed_forward_norm, stream))
        elif layer.feed_forward.bias is not None:
            stream = stream + layer.feed_forward.bias
    head = parts.embedding if parts.head is None else parts.head.weight
    return torch.log_softmax(head.float() @ _norm(parts.final_norm, stream)[-1], dim=-1)


def _norm(part: NormPart | None, x: Tensor) -> Tensor:
    assert part is not None
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + part.epsilon) * part.weight


def _apply(part: LinearPart, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, part.weight.float(), None if part.bias is None else part.bias.float())


def _feed_forward(part: FeedForwardPart, x: Tensor) -> Tensor:
    assert part.gate is not None
    return _apply(part.down, torch.nn.functional.silu(_apply(part.gate, x)) * _apply(part.up, x))


def _attention(parts: DecoderParts, part: AttentionPart, x: Tensor) -> Tensor:
    tokens = len(x)
    query, key, value = (
        _apply(linear, x).view(tokens, heads, part.head_dim).transpose(0, 1)  # [heads, tokens, head_dim]
        for linear, heads in ((part.query, part.n_heads), (part.key, part.n_kv_heads), (part.value, part.n_kv_heads))
    )
    assert parts.rotary is not None
    angles = torch.arange(tokens)[:, None] * parts.rotary.frequencies  # [tokens, head_dim / 2]
    cosine, sine = (torch.cat([each, each], -1) * parts.rotary.scale for each in (angles.cos(), angles.sin()))
    query, key = (each * cosine + _half_turned(each) * sine for each in (query, key))
    group = part.n_heads // part.n_kv_heads
    key, value = (each.repeat_interleave(group, dim=0) for each in (key, value))
    scores = query @ key.transpose(1, 2) * part.scale  # [heads, tokens, tokens]
    hidden = torch.full((tokens, tokens), -torch.inf).triu(1)
    read = (scores + hidden).softmax(-1) @ value  # [heads, tokens, head_dim]
    return _apply(part.output, read.transpose(0, 1).reshape(tokens, -1))


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


class LlamaCpp:
    """A GGUF file in llama.cpp, one thread, with a float32 cache."""

    def __init__(self, path: Path, context: int = 128) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.warmup = False
        params.verbosity = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def complete(self, prompt: str | Sequence[int], count: int, n_probs: int = 8) -> tuple[list[int], dict[int, float]]:
        """Greedy continuation that does not end, and log-probabilities of the likeliest first tokens by id."""
        steps = self._answer(prompt if isinstance(prompt, str) else list(prompt), count, n_probs)["choices"][0][
            "logprobs"
        ]["content"]
        return [each["id"] for each in steps], {each["id"]: each["logprob"] for each in steps[0]["top_logprobs"]}

    def _answer(self, prompt: str | list[int], count: int, n_probs: int) -> Any:
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": n_probs}
        return self._server.handle_completions({**asked, "ignore_eos": True, "cache_prompt": False})


def distance(parts: DecoderParts, ids: Sequence[int], found: dict[int, float]) -> float:
    """Largest absolute difference of log-probabilities from those of torch."""
    expected = log_probabilities(parts, ids)
    return float(np.abs([expected[index].item() - value for index, value in found.items()]).max())


def shortfall(parts: DecoderParts, ids: Sequence[int], continuation: Sequence[int]) -> float:
    """How much less likely in torch a token of the continuation is than the likeliest but the end, at most."""
    found, largest = list(ids), 0.0
    for token in continuation:
        expected = log_probabilities(parts, found)
        expected[END_ID] = -torch.inf
        largest = max(largest, float(expected.max() - expected[token]))
        found.append(token)
    return largest


def rounded(parts: DecoderParts, file_type: str) -> DecoderParts:
    """The model with every matrix rounded to a quantized type, rows filled up to whole blocks before."""
    import gguf

    kind = gguf.GGMLQuantizationType[file_type]

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 2:
            filled = torch.nn.functional.pad(value.float(), (0, -value.shape[1] % 32)).numpy()
            blocks = gguf.quants.quantize(filled, kind)
            return torch.from_numpy(gguf.quants.dequantize(blocks, kind)[:, : value.shape[1]])
        if isinstance(value, tuple):
            return tuple(walk(each) for each in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: walk(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value

    return walk(parts)


Change = Callable[[Any], None]


def write_llama(
    path: Path,
    parts: DecoderParts,
    *,
    file_type: FileType = "F16",
    architecture: str = "llama",
    tokenizer: Any = None,
    change: Change = lambda writer: None,
    factors: bool = False,
) -> Path:
    """A uniform model as llama.cpp's own converter writes it; ``change`` adds keys."""
    hidden = parts.embedding.shape[1]
    layers = file_layers(parts.layers, hidden, 32)
    first = layers[0].attention
    assert first is not None

    def metadata(writer: Any) -> None:
        writer.add_context_length(parts.max_positions)
        writer.add_embedding_length(hidden)
        writer.add_block_count(len(layers))
        writer.add_feed_forward_length(layers[0].width)
        writer.add_head_count(first.n_heads)
        writer.add_head_count_kv(first.n_kv_heads)
        writer.add_rope_dimension_count(first.head_dim)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(parts.final_norm.epsilon)
        tokenizer_keys(tokenizer or byte_level_tokenizer(), len(parts.embedding), None)(writer)
        change(writer)

    size = tuple(parts.embedding.shape)
    assert parts.head is not None
    head = parts.head.weight
    tensors = [matrix("token_embd.weight", (size[0], size[1]), file_type, lambda: parts.embedding)]
    for index, layer in enumerate(layers):
        tensors += layer_tensors(index, layer, hidden, file_type, 1.0)
    tensors += [vector("output_norm.weight", parts.final_norm.weight)]
    tensors += [matrix("output.weight", (size[0], size[1]), file_type, lambda: head)]
    if factors:
        tensors.append(vector("rope_freqs.weight", torch.ones(16)))
    write_gguf(path, architecture, metadata, tensors)
    return path


def write_gpt2(path: Path, model: Any, tokenizer: Any, context: int = 1024) -> Path:
    """A GPT-2 as llama.cpp's own converter writes it, its embedding for a head, too."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(context)
    writer.add_block_count(config.n_layer)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokenizer_keys(tokenizer, config.vocab_size, None)(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            is_turned = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(name, np.ascontiguousarray(value.T if is_turned else value).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
