"""GGUF files as dense models: where one lies, whether transformers reads it rightly, and the model in float32.

transformers turns blocks of quantized weights into plain numbers. It ignores what it does not know, scaled positions
among it, so a file is looked at before it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ziplm_deploy.documents import shortened, shown
from ziplm_deploy.errors import CorruptArtifactError, EnvironmentMismatchError, UnsupportedModelError, ZipLMError
from ziplm_deploy.models.adapted import model_class
from ziplm_deploy.models.config_file import HEAD_PARAMETERS, MAX_VOCABULARY, check_parameter_count
from ziplm_deploy.models.gguf_header import check_header
from ziplm_deploy.models.location import CONFIG_FILE, package_folders, resolve_model_path
from ziplm_deploy.models.shape import MAX_LAYERS, MAX_SIZE

GGUF_SUFFIX = ".gguf"
# What llama.cpp calls architectures whose pruning is known here and which transformers builds from a GGUF file.
ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
_SIZES = {
    "block_count": MAX_LAYERS,
    **dict.fromkeys(("embedding_length", "feed_forward_length"), MAX_SIZE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "attention.key_length"), MAX_SIZE),
    **dict.fromkeys(("attention.value_length", "rope.dimension_count"), MAX_SIZE),
    "vocab_size": MAX_VOCABULARY,
}


@dataclass(frozen=True)
class GgufSummary:
    """What a GGUF file holds, after it was found readable."""

    architecture: str
    tensor_types: tuple[str, ...]  # llama.cpp's names, sorted


def gguf_file_of(path: str) -> Path | None:
    """The GGUF file that ``path`` names, or None where it names none and is to be looked up as a model folder.

    Args:
        path: a file ``*.gguf``, a folder that holds one and no other model, or ``package:NAME`` of a package that does.

    Raises:
        UnsupportedModelError: no such file, or several in the folder or package.
        EnvironmentMismatchError: the package is not installed.
    """
    if path.startswith("package:"):
        folders = package_folders(path.removeprefix("package:"))
        return _only_one(
            path,
            [file for folder in folders for file in (*folder.rglob(f"*{GGUF_SUFFIX}"), *folder.rglob(CONFIG_FILE))],
        )
    place = Path(os.path.expanduser(path))
    if place.suffix == GGUF_SUFFIX:
        if not os.path.isfile(place):
            raise UnsupportedModelError(f"expected a GGUF file at {path}, found none; check model.path")
        return place
    return _only_one(path, list(place.iterdir())) if os.path.isdir(place) else None


def model_place(path: str) -> str:
    """Folder of a model, its GGUF file, or its hub id; raises as :func:`gguf_file_of` and resolve_model_path."""
    file = gguf_file_of(path)
    return resolve_model_path(path) if file is None else str(file)


def check_gguf(file: Path) -> GgufSummary:
    """Refuse a GGUF file that transformers cannot read, or would read wrongly.

    Raises:
        UnsupportedModelError: no GGUF file, truncated, one of several parts, of an unknown architecture, quantized in
            a way that cannot be turned back, or with scaled positions.
        CorruptArtifactError: sizes that no model has, or another number of layers than it says.
        EnvironmentMismatchError: the package ``gguf`` is not installed.
    """
    gguf = gguf_package()
    with _known_to_gguf(file):
        check_header(file)
        return _checked(gguf, gguf.GGUFReader(file), file)


@contextlib.contextmanager
def _known_to_gguf(file: Path) -> Iterator[None]:
    """Whatever the package raises over what a file says: it trusts that."""
    try:
        yield
    except (ZipLMError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"expected a whole GGUF file of tensor types known to gguf {_version()} at {file}, found: "
            f"{shortened(str(error))}; get it anew, or update the package: pip install -U gguf"
        ) from error


def _checked(gguf: Any, reader: Any, file: Path) -> GgufSummary:
    architecture = str(_value(reader, "general.architecture", "none"))
    if architecture not in ARCHITECTURES:
        pruned = " (its layers differ in size; prune the model that it was made from)" if architecture == "deci" else ""
        raise UnsupportedModelError(
            f"expected a GGUF file of architecture {', '.join(ARCHITECTURES)}, found {architecture}{pruned} in {file}; "
            "give the model's folder with safetensors"
        )
    if int(_value(reader, "split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"expected a GGUF file that is whole, found one of {_value(reader, 'split.count', 1)} parts at {file}; "
            "join them: llama-gguf-split --merge FIRST_PART WHOLE"
        )
    unread = sorted(
        tensor.name
        for tensor in reader.tensors
        if tensor.name.startswith("blk.")
        and tensor.name.endswith(".bias")
        and not _reads_bias(architecture, tensor.name)
    )
    if unread:
        raise UnsupportedModelError(
            f"expected weights that transformers reads in {file}, found biases that it leaves out of a {architecture} "
            f"({unread[0]} and {len(unread) - 1} more): give the model's folder with safetensors"
        )
    _check_sizes(reader, architecture, file)
    _check_positions(reader, architecture, file)
    return GgufSummary(architecture, _checked_types(gguf, reader, file))


def load_gguf_config(file: Path) -> PretrainedConfig:
    """Configuration of a GGUF file that :func:`check_gguf` has passed.

    Raises:
        CorruptArtifactError: transformers makes none of its keys.
    """
    with _readable(file):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )
    return config


def load_gguf_model(file: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model in float32, for evaluation; the file must have passed :func:`check_gguf`.

    Raises:
        CorruptArtifactError: its tensors are not those of the model that its keys describe.
    """
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf_package().GGUFReader(file).tensors}
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    check_parameter_count(model_class(config, "AutoModelForCausalLM"), config, shapes, 2 * stored + HEAD_PARAMETERS)
    # Its progress bar heeds no setting of transformers.
    with _readable(file), contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
        model, found = loaded
        absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        if absent:  # they have random numbers now
            raise ValueError(f"no tensor, or one of another shape, for {', '.join(absent)}")
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # of the file; the weights are plain numbers now
    model.hf_quantizer = None  # else save_pretrained refuses them
    evaluated: PreTrainedModel = model.eval()
    return evaluated


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Whatever transformers raises over what a file says: it trusts that."""
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        raise EnvironmentMismatchError(
            f"expected packages that read {file}, found: {error}; run: pip install -U 'ziplm-deploy[llamacpp]'"
        ) from error
    except Exception as error:
        raise CorruptArtifactError(
            f"expected a model that transformers can build in {file}, found: {type(error).__name__}: "
            f"{shortened(str(error))}; get the file anew"
        ) from error


def gguf_package() -> Any:
    """The package ``gguf``, which transformers reads such files with.

    Raises:
        EnvironmentMismatchError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise EnvironmentMismatchError(
            "expected the installed package gguf, which reads GGUF files, found none; "
            "run: pip install 'ziplm-deploy[llamacpp]'"
        ) from error
    return gguf


def _only_one(path: str, candidates: list[Path]) -> Path | None:
    """The GGUF file among these; None if there is none, or if there is a model of another form."""
    files = sorted(file for file in candidates if file.suffix == GGUF_SUFFIX)
    if not files or any(file.name == CONFIG_FILE for file in candidates):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UnsupportedModelError(f"expected one GGUF file in {path}, found {names}; name the file itself")
    return files[0]


def _value(reader: Any, key: str, default: Any) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _reads_bias(architecture: str, name: str) -> bool:
    """Whether transformers gives a GGUF model of this kind that bias."""
    of_qwen2 = name.split(".")[2] in ("attn_q", "attn_k", "attn_v")
    return architecture == "gpt2" or (architecture == "qwen2" and of_qwen2)


def _check_sizes(reader: Any, architecture: str, file: Path) -> None:
    """Refuse sizes that no model has, before anything is built of them."""
    found = {name: _value(reader, f"{architecture}.{name}", None) for name in _SIZES}
    wrong = {
        name: value
        for name, value in found.items()
        if value is not None and not (isinstance(value, (int, np.integer)) and 1 <= value <= _SIZES[name])
    }
    if wrong:
        name, value = next(iter(wrong.items()))
        raise CorruptArtifactError(
            f"expected {name} from 1 to {_SIZES[name]} in {file}, found {shown(value)}; get the file anew"
        )
    blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    if found["block_count"] not in (None, len(blocks)):
        raise CorruptArtifactError(
            f"expected tensors of {found['block_count']} layers in {file}, as its block_count says, found those of "
            f"{len(blocks)}; get the file anew"
        )


def _check_positions(reader: Any, architecture: str, file: Path) -> None:
    scaling = str(_value(reader, f"{architecture}.rope.scaling.type", "none"))
    factors = any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    if scaling != "none" or factors:
        found = "factors on their frequencies (Llama 3.1 and later)" if factors else f"scaling of kind {scaling}"
        raise UnsupportedModelError(
            f"expected plain rotary positions in {file}, found {found}, which transformers does not read from "
            "GGUF; give the model's folder with safetensors"
        )


def _checked_types(gguf: Any, reader: Any, file: Path) -> tuple[str, ...]:
    size_bytes = os.path.getsize(file)
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    if any(tensor.data_offset + tensor.n_bytes > size_bytes for tensor in reader.tensors):
        raise UnsupportedModelError(f"expected a whole GGUF file at {file}, found a truncated one; get it anew")
    unreadable = sorted(kind.name for kind in kinds if not _is_readable(gguf, kind))
    if unreadable:
        raise UnsupportedModelError(
            f"expected weights that gguf {_version()} turns back into numbers in {file}, found "
            f"{', '.join(unreadable)}; give a file in F16 or Q8_0, or the model's folder with safetensors"
        )
    return tuple(sorted(kind.name for kind in kinds))


def _is_readable(gguf: Any, kind: Any) -> bool:
    """Whether blocks of this type become numbers; one block of zeros is tried."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
