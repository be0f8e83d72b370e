"""Load a dense model, save a resized one, and load that again in a fresh process.

A member's folder has ``config.json`` (of the dense model, plus ``per_layer_config`` with what differs by layer), the
weights in ``pruned.safetensors``, ``ziplm_config.json`` (kept heads and columns) and the tokenizer. The weights have
no standard name on purpose: transformers would fill the tensors whose shapes differ with random numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from ziplm_deploy.architectures import architecture_of, model_shape, output_linear, prunable_modules
from ziplm_deploy.artifacts import Artifact, ModelShape, write_bytes_with, write_text
from ziplm_deploy.config import ModelConfig, TaskName
from ziplm_deploy.errors import (
    CorruptArtifactError,
    EnvironmentMismatchError,
    RecipeError,
    StorageError,
    UnsupportedModelError,
    UsageError,
)
from ziplm_deploy.pruning.levels import LevelWeights
from ziplm_deploy.resizing import build_replacement, install, kept_structures, set_kept
from ziplm_deploy.sources import resolve_model_path
from ziplm_deploy.tasks import TASKS

MEMBER_FILE = "ziplm_config.json"
WEIGHTS_FILE = "pruned.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class MemberConfig(Artifact):
    """``ziplm_config.json``: what :func:`load` needs beside ``config.json`` and the weights."""

    KIND: ClassVar[str] = "ziplm_member"

    model_class: str  # class of transformers
    pooling_layer: bool  # whether the class was built with its pooler
    task: TaskName
    pooling: str
    normalize: bool
    sizes: dict[str, int]  # kept structures a module, "LAYER.KIND"
    kept: dict[str, list[int]]  # indices into the original dense model
    weights_sha256: str
    extra: dict[str, Any] = Field(default_factory=dict)

    def save(self, path: Path) -> None:
        # Compact: with indentation every one of the thousands of kept columns would get a line.
        head = {"kind": self.KIND, "schema_version": self.SCHEMA_VERSION}
        write_text(path, json.dumps({**head, **self.model_dump(mode="json")}) + "\n")


def load_dense(model_config: ModelConfig, new_head: dict[str, Any] | None = None) -> tuple[nn.Module, Any]:
    """The dense model (eval mode, float32, eager attention) and its tokenizer or image processor.

    A local folder is read without the network. No pickle is opened and no remote code is run.

    Args:
        new_head: settings of the configuration (``num_labels``, …) for a model that is about to be fine-tuned: a head
            that is missing, or of another size, starts at random.

    Raises:
        UnsupportedModelError: architecture, weight format or task do not fit, or the head's weights are missing.
        CorruptArtifactError: config or weights are damaged.
        RecipeError: the model's own settings ask for another pooling.
        EnvironmentMismatchError: a package that the model or its processor needs is missing.
    """
    path = resolve_model_path(model_config.path)
    source: dict[str, Any] = {"trust_remote_code": False}
    if Path(path).is_dir():
        source["local_files_only"] = True
        _check_files(Path(path), TASKS[model_config.task].auto_class)
        _check_pooling(path, model_config)
    elif model_config.revision is not None:
        source["revision"] = model_config.revision
    config = _load_config(path, source)
    architecture_of(config)
    for name, value in (new_head or {}).items():
        setattr(config, name, value)
    model = _load_weights(path, config, TASKS[model_config.task].auto_class, source, may_lack_head=new_head is not None)
    return model, _load_processor(path, TASKS[model_config.task].input_kind, source)


def _check_pooling(path: str, settings: ModelConfig) -> None:
    """Refuse a recipe whose pooling is not the one that the model was trained with (sentence-transformers' folder)."""
    file = Path(path) / "1_Pooling" / "config.json"
    if settings.task != "sentence-similarity" or not file.is_file():
        return
    try:
        modes = json.loads(file.read_text(encoding="utf-8"))
        own = {"cls": modes.get("pooling_mode_cls_token"), "mean": modes.get("pooling_mode_mean_tokens")}
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptArtifactError(f"expected the pooling settings in {file}, found: {error}; copy it again") from error
    if not own[settings.pooling]:
        wanted = [name for name, used in own.items() if used] or ["another pooling, which is not supported"]
        raise RecipeError(f"expected model.pooling: {wanted[0]}, as {file} says, found {settings.pooling}")


def _load_config(path: str, source: dict[str, Any]) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(path, **source)
    except (TypeError, AttributeError) as error:  # JSON, but no mapping
        raise CorruptArtifactError(
            f"expected a mapping of settings in config.json of {path}, found: {error}; copy the folder again"
        ) from error
    except ValueError as error:  # unknown model_type, or a field of the wrong type
        raise UnsupportedModelError(
            f"expected the configuration of a supported model in {path}, found: {error}"
        ) from error
    except OSError as error:
        if Path(path).is_dir():
            raise CorruptArtifactError(
                f"expected a readable config.json in {path}, found: {error}; copy the folder again"
            ) from error
        raise UnsupportedModelError(
            f"expected a local folder or a reachable hub id, found {path!r}: {error}; download it and give the folder"
        ) from error
    # Members, exporters and tasks read outputs by name and want nothing else in the graph.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    return config


def _load_weights(path: str, config: Any, auto_class: str, source: dict[str, Any], may_lack_head: bool) -> nn.Module:
    loader = getattr(transformers, auto_class)
    try:
        model_class = loader._model_mapping[type(config)]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    except KeyError:
        raise UnsupportedModelError(
            f"expected a model with a head for {auto_class}, found a {config.model_type}; choose another task"
        ) from None
    try:
        with _quiet_transformers():  # what it warns about, missing weights, is an error below
            model, report = model_class.from_pretrained(
                path,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=may_lack_head,
                **({"add_pooling_layer": False} if _pooler_is_optional(model_class, auto_class) else {}),
                **source,
            )
    except (SafetensorError, RuntimeError) as error:
        raise CorruptArtifactError(
            f"expected weights that fit config.json in {path}, found: {error}; copy the checkpoint again"
        ) from error
    except OSError as error:
        raise UnsupportedModelError(
            f"expected safetensors weights in {path}, found: {error}; {_conversion(path, auto_class)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if may_lack_head:
        inside = f"{model_class.base_model_prefix}."
        missing = [name for name in missing if name.startswith(inside) and ".pooler." not in name]
    if missing:
        raise UnsupportedModelError(
            f"expected all weights of {model_class.__name__} in {path}, found none for {_first(missing)}: they would "
            "be random; fine-tune the model for this task first, or choose the task it was trained for"
        )
    dense: nn.Module = model.eval()
    return dense


def _load_processor(path: str, input_kind: str, source: dict[str, Any]) -> Any:
    loader: Any = transformers.AutoImageProcessor if input_kind == "image" else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(path, **({"use_fast": False} if input_kind == "image" else {}), **source)
    except ImportError as error:
        raise EnvironmentMismatchError(f"expected the packages for inputs of {path}, found: {error}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = "image processor: preprocessor_config.json" if input_kind == "image" else "tokenizer: tokenizer.json"
        raise UnsupportedModelError(
            f"expected {what} in {path}, found: {error}; copy its files from the model it was trained from"
        ) from error


def _check_files(folder: Path, auto_class: str) -> None:
    if (folder / MEMBER_FILE).exists():
        raise UnsupportedModelError(
            f"expected a dense model in {folder}, found a pruned one ({MEMBER_FILE}); prune the model it came from"
        )
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"expected config.json in {folder}, found none; check model.path")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
        if pickles:
            raise UnsupportedModelError(
                f"expected *.safetensors in {folder}, found only pickled weights ({_first(pickles)}), which can run "
                f"any code when opened; {_conversion(str(folder), auto_class)}"
            )
        raise UnsupportedModelError(f"expected model.safetensors in {folder}, found no weights; check model.path")
    for shard in shards:
        _check_safetensors(shard)


def _conversion(path: str, auto_class: str) -> str:
    code = (
        f"from transformers import {auto_class} as M; "
        f"M.from_pretrained({path!r}, use_safetensors=False).save_pretrained({path!r}, safe_serialization=True)"
    )
    return f'if you trust where they came from, convert them: python -c "{code}"'


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(
            f"expected whole safetensors weights in {path}, found: {error}; it is truncated or damaged, copy it again"
        ) from error


def _save_weights(model: nn.Module, path: Path) -> None:
    try:
        save_model(model, str(path))
    except SafetensorError as error:  # a full disk arrives as this
        raise OSError(str(error)) from error


def save_member(
    folder: Path, model: nn.Module, processor: Any, model_config: ModelConfig, extra: dict[str, Any]
) -> None:
    """Write a resized (or dense) model and its processor; ``extra`` is any JSON data to keep with it.

    ``ziplm_config.json`` comes last: a folder whose writing was interrupted cannot be loaded.

    Raises:
        StorageError: a file cannot be written.
    """
    folder = Path(folder)
    kept = kept_structures(model)
    shape = model_shape(model.config)  # type: ignore[arg-type]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MEMBER_FILE).unlink(missing_ok=True)
        processor.save_pretrained(folder)
    except OSError as error:
        raise StorageError(f"expected to write {folder}, found: {error.strerror or error}; free disk space") from error
    write_text(folder / "config.json", _config_json(model, kept, shape))
    if model_config.task == "sentence-similarity":
        _write_sentence_modules(folder, model_config, shape.hidden_size)
    write_bytes_with(folder / WEIGHTS_FILE, lambda path: _save_weights(model, path))
    MemberConfig(
        model_class=type(model).__name__,
        pooling_layer=getattr(model, "pooler", None) is not None,
        task=model_config.task,
        pooling=model_config.pooling,
        normalize=model_config.normalize,
        sizes={name: len(indices) for name, indices in kept.items()},
        kept=kept,
        weights_sha256=_sha256(folder / WEIGHTS_FILE),
        extra=extra,
    ).save(folder / MEMBER_FILE)


def load(folder: Path | str) -> nn.Module:
    """The model of a member's folder, in eval mode, with exactly the outputs it had when it was saved.

    Raises:
        CorruptArtifactError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    member = MemberConfig.load(folder / MEMBER_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or _sha256(weights) != member.weights_sha256:
        found = "other content" if weights.is_file() else "no file"
        raise CorruptArtifactError(
            f"expected the weights that {MEMBER_FILE} describes in {weights}, found {found}; copy the folder again"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = _build(config, member)
        load_model(model, str(weights))
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError, SafetensorError, UsageError) as error:
        raise CorruptArtifactError(
            f"expected config.json, {MEMBER_FILE} and {WEIGHTS_FILE} of one model in {folder}, found: {error}; "
            "copy the folder again"
        ) from error
    return model.eval()


def _build(config: Any, member: MemberConfig) -> nn.Module:
    """The member's modules, with weights still to be loaded."""
    model_class = getattr(transformers, member.model_class, None)
    if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"model class {member.model_class!r}, which transformers does not have")
    config._attn_implementation = "eager"
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    with torch.random.fork_rng(devices=[]):  # the initial weights must not consume the caller's random numbers
        model: nn.Module = model_class(config, **({"add_pooling_layer": member.pooling_layer} if takes_pooler else {}))
    for module in prunable_modules(model):
        kept = torch.tensor(member.kept[module.name], dtype=torch.int64)
        if torch.equal(kept, torch.arange(module.structures)):
            continue
        hidden = output_linear(model, module).out_features
        weight = torch.zeros(hidden, kept.numel() * module.group_size)
        entry = LevelWeights(kept=kept, weight=weight, bias=torch.zeros(hidden), relative_error=float("nan"))
        install(model, module.layer, build_replacement(model, module, entry))
    set_kept(model, member.kept)
    return model


def _config_json(model: nn.Module, kept: dict[str, list[int]], shape: ModelShape) -> str:
    config: Any = model.config
    fields: dict[str, Any] = config.to_diff_dict()
    fields.pop("_name_or_path", None)
    width_name = architecture_of(config).config_ffn_width
    per_layer: dict[str, dict[str, int]] = {}
    for layer in range(shape.n_layers):
        sizes = {
            "num_attention_heads": (len(kept[f"{layer}.attention"]), shape.n_heads),
            width_name: (len(kept[f"{layer}.ffn"]), shape.intermediate_size),
        }
        differing = {name: size for name, (size, dense) in sizes.items() if size != dense}
        if differing:
            per_layer[str(layer)] = differing
    # As in transformers >= 5.14: by layer, only what differs from the global value. Older versions ignore it.
    fields |= {"architectures": [type(model).__name__], "per_layer_config": per_layer}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _write_sentence_modules(folder: Path, model_config: ModelConfig, hidden_size: int) -> None:
    """What sentence-transformers needs to use the folder with its ONNX back end."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] * model_config.normalize)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    pooling = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode_cls_token": model_config.pooling == "cls",
        "pooling_mode_mean_tokens": model_config.pooling == "mean",
    }
    write_text(folder / "modules.json", json.dumps(modules, indent=1) + "\n")
    write_text(folder / "1_Pooling" / "config.json", json.dumps(pooling, indent=1) + "\n")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    logging: Any = transformers.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _pooler_is_optional(model_class: Any, auto_class: str) -> bool:
    return auto_class == "AutoModel" and "add_pooling_layer" in inspect.signature(model_class).parameters


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
