"""Tokenizers as GGUF keys: copied from another GGUF file, or made of a BPE one of Hugging Face.

llama.cpp does not read how text is split before merges: it knows some ways by name (``tokenizer.ggml.pre``). The ways
that it has in common with Hugging Face's models of the Llama kind are in :data:`PRE_TOKENIZERS`; others are refused
unless the caller names one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporters.encoder import ExportError
from exporters.gguf_file import gguf_package
from exporters.gguf_sentencepiece import has_space_prefix, is_byte, is_sentencepiece, token_scores

# A GGUF file, a folder with tokenizer.json, or a fast tokenizer of transformers; None: of a file that is only timed.
TokenizerSource = Path | Any | None

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# Steps as tokenizer.json spells them, by llama.cpp's name.
PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": [_split(_LLAMA3), _BYTES],
    "qwen2": [_split(_QWEN2), _BYTES],
}


def tokenizer_keys(source: TokenizerSource, vocabulary_size: int, pre_tokenizer: str | None) -> Callable[[Any], None]:
    """A function that adds the tokenizer's keys to a ``gguf.GGUFWriter``.

    Args:
        source: a GGUF file, a folder with ``tokenizer.json``, or a fast tokenizer of transformers; None for a file that
            is only timed: llama.cpp wants a vocabulary, and gets tokens that mean nothing.
        vocabulary_size: rows of the embedding; those beyond the tokenizer's become unused tokens.
        pre_tokenizer: llama.cpp's name of the way to split text; None: told from the tokenizer.

    Raises:
        ExportError: no tokenizer there, one that is no BPE of a known kind, a way to split that has no known name, or
            more tokens than rows.
    """
    if source is None:
        return _placeholders(vocabulary_size)
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix == ".gguf":
            return _copied(path, vocabulary_size, pre_tokenizer)
        source = _loaded(path)
    return _of_hugging_face(source, vocabulary_size, pre_tokenizer)


def _placeholders(vocabulary_size: int) -> Callable[[Any], None]:
    """Keys of a tokenizer that splits nothing: its tokens are numbers."""
    kind = int(gguf_package().TokenType.NORMAL)

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([f"token {index}" for index in range(vocabulary_size)])
        writer.add_token_scores([0.0] * vocabulary_size)
        writer.add_token_types([kind] * vocabulary_size)

    return add


def pre_tokenizer_of(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a ``tokenizer.json`` splits text; None where it has none that is known here."""
    if _steps(tokenizer.get("normalizer"), "normalizers") not in ([], [{"type": "NFC"}]):
        return None
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    name = next((name for name, known in PRE_TOKENIZERS.items() if _plain(known) == _plain(steps)), None)
    # llama.cpp looks whole words up before it merges there, and only there.
    return None if (name == "llama-bpe") != bool(tokenizer["model"].get("ignore_merges")) else name


def _steps(part: Mapping[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    return [step for each in part[several] for step in _steps(each, several)]


def _plain(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps without what does not change the tokens."""
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ExportError(
            f"expected a GGUF file or a folder with tokenizer.json at {folder}, found none; "
            "give the folder that the model was loaded from"
        )
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)  # type: ignore[no-untyped-call, unused-ignore]


def _copied(path: Path, vocabulary_size: int, pre_tokenizer: str | None) -> Callable[[Any], None]:
    """All keys of another file's tokenizer as they are."""
    gguf = gguf_package()
    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError) as error:
        raise ExportError(f"expected a GGUF file at {path}, found: {error}; get it anew") from error
    keys = {name: field for name, field in fields.items() if name.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in keys:
        raise ExportError(f"expected a tokenizer in {path}, found no tokenizer.ggml.tokens; name another source")
    n_tokens = len(keys["tokenizer.ggml.tokens"].data)
    if n_tokens != vocabulary_size:
        raise ExportError(
            f"expected {vocabulary_size} tokens (rows of the embedding) in {path}, found {n_tokens}; "
            "give the file that the model was loaded from"
        )

    def add(writer: Any) -> None:
        for name, field in keys.items():
            value = field.contents()
            if name == "tokenizer.ggml.pre" and pre_tokenizer is not None:
                value = pre_tokenizer
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if array else None)

    return add


def _of_hugging_face(tokenizer: Any, vocabulary_size: int, pre_tokenizer: str | None) -> Callable[[Any], None]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"expected a fast tokenizer, found {type(tokenizer).__name__}; load it with AutoTokenizer, or give the "
            "GGUF file of the same model"
        )
    described = json.loads(backend.to_str())
    if is_sentencepiece(described):
        return _with_scores(tokenizer, described, vocabulary_size)
    return _with_merges(tokenizer, described, vocabulary_size, pre_tokenizer)


def _with_scores(tokenizer: Any, described: Mapping[str, Any], vocabulary_size: int) -> Callable[[Any], None]:
    """Keys of a tokenizer of SentencePiece's kind."""
    kinds = gguf_package().TokenType
    tokens, types = _tokens(described, vocabulary_size)
    types = [int(kinds.BYTE) if is_byte(text) else kind for text, kind in zip(tokens, types, strict=True)]
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(kinds.UNKNOWN)
    scores = token_scores(described)
    steps = _steps(described.get("normalizer"), "normalizers") + _steps(described.get("pre_tokenizer"), "pretokenizers")
    space = has_space_prefix(steps)

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([scores.get(index, 0.0) for index in range(vocabulary_size)])
        writer.add_token_types(types)
        writer.add_add_space_prefix(space)
        _special_keys(writer, tokenizer)

    return add


def _with_merges(
    tokenizer: Any, described: Mapping[str, Any], vocabulary_size: int, pre_tokenizer: str | None
) -> Callable[[Any], None]:
    """Keys of a byte-level tokenizer."""
    _check_byte_level(described)
    name = pre_tokenizer or pre_tokenizer_of(described)
    if name is None:
        raise ExportError(
            f"expected a tokenizer that splits text like one of {', '.join(PRE_TOKENIZERS)}, found another way; give "
            "llama.cpp's name of it (pre_tokenizer), or the GGUF file of the same model"
        )
    tokens, types = _tokens(described, vocabulary_size)
    merges = [each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]]

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        _special_keys(writer, tokenizer)

    return add


def _check_byte_level(described: Mapping[str, Any]) -> None:
    model = described["model"]
    decoder = _steps(described.get("decoder"), "decoders")
    byte_level = any(step["type"] == "ByteLevel" for step in decoder)
    if model["type"] != "BPE" or not byte_level:
        raise ExportError(
            f"expected a BPE tokenizer on bytes, or with byte tokens, found {model['type']} of another kind; "
            "give the GGUF file of the same model, whose tokenizer is copied"
        )


def _tokens(described: Mapping[str, Any], vocabulary_size: int) -> tuple[list[str], list[int]]:
    """Token texts and llama.cpp's types of them, by id."""
    kinds = gguf_package().TokenType
    found = {index: (text, kinds.NORMAL) for text, index in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        found[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    if max(found) >= vocabulary_size:
        raise ExportError(
            f"expected token ids below {vocabulary_size} (rows of the embedding), found {max(found)}; "
            "give the tokenizer that the model was loaded with"
        )
    entries = [found.get(index, (f"[PAD{index}]", kinds.UNUSED)) for index in range(vocabulary_size)]
    return [text for text, _ in entries], [int(kind) for _, kind in entries]


def _special_keys(writer: Any, tokenizer: Any) -> None:
    ids = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, token_id in ids.items():
        if token_id is not None:
            add(token_id)
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(whole != plain and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(whole != plain and whole[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
