"""Tokenizers of GGUF files.

transformers reads them, too, but with differences from release to release: 4.57 adds a start token where the file says
no, and takes another token for the end; 5.24 splits no digits where ``smollm`` does. A file describes its tokenizer
fully, so it is made here from the keys, the way llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors  # type: ignore[import-untyped, unused-ignore]
from transformers import PreTrainedTokenizerFast

from exporters.gguf_sentencepiece import pairs_of
from exporters.gguf_tokenizer import PRE_TOKENIZERS
from ziplm_deploy.documents import shortened
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError, ZipLMError
from ziplm_deploy.models.gguf_source import gguf_package

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_gguf_tokenizer(file: Path) -> Any:
    """A fast tokenizer that makes the tokens that llama.cpp makes.

    Raises:
        UnsupportedModelError: the file has none, or one that splits text in a way that is not known here.
        CorruptArtifactError: its tokens, kinds and merges do not fit each other.
        EnvironmentMismatchError: the package ``gguf`` is not installed.
    """
    try:
        return _read(file)
    except (ZipLMError, ImportError, MemoryError):
        raise
    except Exception as error:  # of any kind, over what the file says
        raise CorruptArtifactError(
            f"expected a whole tokenizer in {file}, found: {type(error).__name__}: {shortened(str(error))}; get the "
            "file anew, or give the model's folder with tokenizer.json"
        ) from error


def _read(file: Path) -> Any:
    fields = gguf_package().GGUFReader(file).fields
    prefix = "tokenizer.ggml."
    keys = {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if keys.get("model") not in makers:
        raise UnsupportedModelError(
            f"expected a tokenizer of kind gpt2 or llama in {file}, found {keys.get('model', 'none')}; "
            "give the model's folder with tokenizer.json"
        )
    backend = makers[keys["model"]](keys, file)
    _add_tokens(backend, keys)
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    for name, key in _SPECIAL.items():
        if keys.get(key) is not None:
            setattr(tokenizer, name, keys["tokens"][keys[key]])
    if "tokenizer.chat_template" in fields:
        tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


def _byte_level(keys: Mapping[str, Any], file: Path) -> Tokenizer:
    name = keys.get("pre", "none")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"expected a tokenizer that splits text like {', '.join(PRE_TOKENIZERS)} in {file}, found {name}; "
            "give the model's folder with tokenizer.json"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in keys["merges"]]
    model = models.BPE(vocab=_vocabulary(keys), merges=merges, ignore_merges=name == "llama-bpe")
    tokenizer = _with_steps(Tokenizer(model), PRE_TOKENIZERS[name])
    tokenizer.decoder = decoders.ByteLevel()
    if keys.get("add_bos_token", name == "llama-bpe"):  # what llama.cpp does where the file does not say
        _start_with(tokenizer, keys)
    return tokenizer


def _sentencepiece(keys: Mapping[str, Any], file: Path) -> Tokenizer:
    """llama.cpp merges any two neighbours that are a token together, that of the best score first."""
    normal = gguf_package().TokenType.NORMAL
    scored = zip(keys["scores"], keys["tokens"], keys["token_type"], strict=True)
    best_first = [text for _, text in sorted((-score, text) for score, text, kind in scored if kind == normal)]
    unknown = keys["tokens"][keys["unknown_token_id"]] if "unknown_token_id" in keys else None
    model = models.BPE(
        vocab=_vocabulary(keys), merges=list(pairs_of(best_first)), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    endings: list[Any] = []
    if keys.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        endings.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *endings]
    )
    if keys.get("add_bos_token", True):
        _start_with(tokenizer, keys)
    return tokenizer


def _vocabulary(keys: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text, without rows of the embedding that stand for no token."""
    unused = gguf_package().TokenType.UNUSED
    tokens = enumerate(zip(keys["tokens"], keys["token_type"], strict=True))
    return {text: index for index, (text, kind) in tokens if kind != unused}


def _add_tokens(tokenizer: Tokenizer, keys: Mapping[str, Any]) -> None:
    """Have special tokens, and those that the model's makers added, found in text before all else."""
    kinds = gguf_package().TokenType
    special = (kinds.CONTROL, kinds.UNKNOWN)
    tokens = list(zip(keys["tokens"], keys["token_type"], strict=True))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text, kind in tokens if kind in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in tokens if kind == kinds.USER_DEFINED])


def _start_with(tokenizer: Tokenizer, keys: Mapping[str, Any]) -> None:
    """Begin every text with the start token."""
    start = keys["tokens"][keys["bos_token_id"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, keys["bos_token_id"])]
    )


def _with_steps(tokenizer: Tokenizer, steps: list[dict[str, Any]]) -> Tokenizer:
    """The tokenizer with pre-tokenizers as ``tokenizer.json`` spells them."""
    described = json.loads(tokenizer.to_str())
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return Tokenizer.from_str(json.dumps(described))
