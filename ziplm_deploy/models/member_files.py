"""Save a resized model, and load it again in a fresh process.

A member's folder has ``config.json`` (of the dense model, plus ``per_layer_config`` with what differs by layer), the
weights in ``pruned.safetensors``, ``ziplm_config.json`` (kept heads and columns) and the tokenizer. The weights have
no standard name on purpose: transformers would fill the tensors whose shapes differ with random numbers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from ziplm_deploy.artifacts import Artifact, Fields, atomic_folder, file_hash, write_bytes_with, write_text
from ziplm_deploy.documents import read_json, shortened
from ziplm_deploy.errors import CorruptArtifactError, StorageError, UnsupportedModelError
from ziplm_deploy.models.adapted import adapted
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import without_cache
from ziplm_deploy.models.config_file import (
    check_layer_count,
    check_parameter_count,
    config_of,
    first_not_finite,
    stored_shapes,
)
from ziplm_deploy.models.label_maps import settle_class_names
from ziplm_deploy.models.levels import LevelWeights
from ziplm_deploy.models.modules import model_shape, output_bias_name, output_linear, prunable_modules
from ziplm_deploy.models.own_settings import completed
from ziplm_deploy.models.processors import limit_length
from ziplm_deploy.models.resizing import build_replacement, install, kept_structures, set_kept
from ziplm_deploy.models.sentence_dense import DenseLayer, attach, layers_of_dense
from ziplm_deploy.models.sentence_folder import renew_settings, write_sentence_files
from ziplm_deploy.models.sentence_modules import read_sentence_modules
from ziplm_deploy.models.shape import ModelShape, ModuleId
from ziplm_deploy.recipe import ModelConfig, TaskName

MEMBER_FILE = "ziplm_config.json"
WEIGHTS_FILE = "pruned.safetensors"
# Some configurations of transformers check sizes of the whole model, which it refuses to read if they differ by layer.
_READ_BY_LAYER = {"allow_global_per_layer_attribute_access": True}
# The dense model that a member is built from is at most so many times as large, beyond a GiB that costs nobody much.
MAX_PRUNING, FREE_PARAMETERS = 16, 1 << 28


def _without_dense_layers(fields: Fields) -> Fields:
    """Fields of schema 2: members did not hold layers after the pooling before."""
    return {**fields, "dense_layers": ()}


class MemberConfig(Artifact):
    """``ziplm_config.json``: what :func:`load` needs beside ``config.json`` and the weights."""

    KIND: ClassVar[str] = "ziplm_member"
    SCHEMA_VERSION: ClassVar[int] = 2
    MIGRATIONS: ClassVar[Mapping[int, Callable[[Fields], Fields]]] = {1: _without_dense_layers}

    model_class: str  # class of transformers
    pooling_layer: bool  # whether the class was built with its pooler
    task: TaskName
    pooling: str
    normalize: bool
    dense_layers: tuple[DenseLayer, ...]  # between pooling and normalization; weights with the others
    sizes: dict[str, int]  # kept structures a module, "LAYER.KIND"
    kept: dict[str, list[int]]  # indices into the original dense model
    weights_sha256: str
    extra: dict[str, Any] = Field(default_factory=dict)

    def save(self, path: Path) -> None:
        # Compact: with indentation every one of the thousands of kept columns would get a line.
        head = {"kind": self.KIND, "schema_version": self.SCHEMA_VERSION}
        write_text(path, json.dumps({**head, **self.model_dump(mode="json")}) + "\n")


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
    own = read_sentence_modules(model_config)
    complete = completed(model_config, own)
    pooling, normalize = complete.head
    kept = kept_structures(model)
    limit_length(processor, model)
    shape = model_shape(model.config)  # type: ignore[arg-type]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MEMBER_FILE).unlink(missing_ok=True)
        processor.save_pretrained(folder)
    except OSError as error:
        raise StorageError(f"expected to write {folder}, found: {error.strerror or error}; free disk space") from error
    write_text(folder / "config.json", _config_json(model, kept, shape))
    if model_config.task == "sentence-similarity" and pooling != "pooler":  # sentence-transformers has no such pooling
        write_sentence_files(folder, model, complete, own)
    write_bytes_with(folder / WEIGHTS_FILE, lambda path: _save_weights(model, path))
    MemberConfig(
        model_class=type(model).__name__,
        pooling_layer=getattr(model, "pooler", None) is not None,
        task=model_config.task,
        pooling=pooling,
        normalize=normalize,
        dense_layers=layers_of_dense(model),
        sizes={name: len(indices) for name, indices in kept.items()},
        kept=kept,
        weights_sha256=file_hash(folder / WEIGHTS_FILE),
        extra=extra,
    ).save(folder / MEMBER_FILE)


def renew_prompts(folders: Iterable[Path], model_config: ModelConfig) -> None:
    """Write members' prompts as the recipe has them now: those of queries and passages are no part of their answers.

    Raises:
        StorageError: a file cannot be written.
    """
    if model_config.task != "sentence-similarity":
        return
    own = read_sentence_modules(model_config)
    complete = completed(model_config, own)
    for folder in folders:
        if complete.pooling != "pooler":
            renew_settings(folder, complete, own)


def replace_member(
    folder: Path, model: nn.Module, processor: Any, model_config: ModelConfig, extra: dict[str, Any]
) -> None:
    """Replace a folder by one with this model, whole or not at all; arguments as of :func:`save_member`."""
    with atomic_folder(folder) as making:  # an ONNX file of an earlier plan must not stay beside the new weights
        save_member(making, model, processor, model_config, extra)


def load(folder: Path | str) -> nn.Module:
    """The model of a member's folder, in eval mode, with exactly the outputs it had when it was saved.

    Raises:
        CorruptArtifactError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    member = MemberConfig.load(folder / MEMBER_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or file_hash(weights) != member.weights_sha256:
        found = "other content" if weights.is_file() else "no file"
        raise CorruptArtifactError(
            f"expected the weights that {MEMBER_FILE} describes in {weights}, found {found}; copy the folder again"
        )
    try:
        model = _build(_dense_config(folder), member, weights)
        _check_names(model, weights)
        load_model(model, str(weights))
        damaged = first_not_finite(model)
        if damaged is not None:
            raise ValueError(f"NaN or infinity in {damaged}")
    except (CorruptArtifactError, UnsupportedModelError) as error:
        raise CorruptArtifactError(str(error)) from error
    except Exception as error:  # transformers trusts the fields of config.json, so that it may raise anything
        raise CorruptArtifactError(
            f"expected config.json, {MEMBER_FILE} and {WEIGHTS_FILE} of one model in {folder}, found: "
            f"{shortened(str(error)) or type(error).__name__}; copy the folder again"
        ) from error
    return without_cache(model.eval())


def _check_names(model: nn.Module, weights: Path) -> None:
    """Raise ``ValueError`` for weights of modules that have other names here.

    Tensors are called after the modules of transformers, which renames them now and then: ViT's in 5.9.
    """
    with safe_open(weights, framework="pt") as tensors:
        unknown = sorted(set(tensors.keys()) - set(model.state_dict()))
    if unknown:
        raise ValueError(
            f"weights of {unknown[0]} and {len(unknown) - 1} more that transformers {transformers.__version__} calls "
            "otherwise: load the folder with the version of transformers that wrote it, or make it again with this one"
        )


def _dense_config(folder: Path) -> Any:
    """The dense model's configuration: without what differs by layer, which newer transformers would apply."""
    fields = read_json(folder / "config.json", finite=True)
    for name in ("per_layer_config", *_READ_BY_LAYER):
        fields.pop(name, None)
    config = config_of(fields, str(folder))
    settle_class_names(config, fields, str(folder))
    return config


def _build(config: Any, member: MemberConfig, weights: Path) -> nn.Module:
    """The member's modules, with weights still to be loaded."""
    model_class = getattr(transformers, member.model_class, None)
    if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"model class {member.model_class!r}, which transformers does not have")
    if model_class.config_class is not type(config):
        raise ValueError(f"model class {member.model_class!r} for a {config.model_type} model")
    config._attn_implementation = "eager"
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    options = {"add_pooling_layer": member.pooling_layer} if takes_pooler else {}
    shapes = stored_shapes([weights])
    check_layer_count(config, shapes, str(weights))
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    check_parameter_count(model_class, config, shapes, MAX_PRUNING * stored + FREE_PARAMETERS, **options)
    with torch.random.fork_rng(devices=[]):  # the initial weights must not consume the caller's random numbers
        model: nn.Module = adapted(model_class(config, **options))
    for module in prunable_modules(model):
        indices = member.kept[module.name]
        if len(indices) > module.structures:
            raise ValueError(f"{len(indices)} kept structures of {module.structures} in {module.name}")
        kept = torch.tensor(indices, dtype=torch.int64)
        got_bias = output_bias_name(model, module) in shapes and output_linear(model, module).bias is None
        if torch.equal(kept, torch.arange(module.structures)) and not got_bias:
            continue
        hidden = output_linear(model, module).out_features
        weight = torch.zeros(hidden, kept.numel() * module.group_size)
        bias = torch.full((hidden,), float(got_bias))  # only what is not zero makes a linear that adds one
        entry = LevelWeights(kept=kept, weight=weight, bias=bias, relative_error=float("nan"))
        install(model, module.layer, build_replacement(model, module, entry))
    attach(model, member.dense_layers, shapes)
    set_kept(model, member.kept)
    return model


def _config_json(model: nn.Module, kept: dict[str, list[int]], shape: ModelShape) -> str:
    config: Any = model.config
    fields: dict[str, Any] = config.to_diff_dict()
    fields.pop("_name_or_path", None)
    if architecture_of(config).causal is not None:
        fields.pop("use_cache", None)  # off here, on where members serve
    architecture, queries = architecture_of(config), shape.queries_per_head
    per_layer: dict[str, dict[str, int]] = {}
    for layer in range(shape.n_layers):
        n_heads = len(kept[str(ModuleId(layer, "attention"))])
        sizes = {
            "num_attention_heads": (queries * n_heads, queries * shape.n_heads),
            architecture.config_kv_heads: (n_heads, shape.n_heads),
            architecture.config_ffn_width: (len(kept[str(ModuleId(layer, "ffn"))]), shape.intermediate_size),
        }
        differing = {name: size for name, (size, dense) in sizes.items() if name is not None and size != dense}
        if differing:
            per_layer[str(layer)] = differing
    # As in transformers >= 5.14: by layer, only what differs from the global value. Older versions ignore it.
    fields |= {"architectures": [type(model).__name__], "per_layer_config": per_layer}
    if per_layer:
        fields |= _READ_BY_LAYER
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
