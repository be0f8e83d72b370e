"""``config.json`` of a checkpoint, read as data and checked before transformers builds anything from it.

A folder may come from anywhere. No code that it names is looked for; sizes must be those of models, and fit the headers
of the weights beside it, so that a few bytes never take gigabytes of memory or hours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from ziplm_deploy.documents import read_json, shown
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.architectures import ARCHITECTURES, CHOICES, native_type, why_unsupported
from ziplm_deploy.models.shape import MAX_LAYERS, MAX_SIZE
from ziplm_deploy.models.two_towers import Reads, tower_fields

Shapes = Mapping[str, tuple[int, ...]]

MAX_VOCABULARY = 1 << 22
HEAD_PARAMETERS = 1 << 26  # a head that starts at random, and what else a checkpoint of a base model may lack
MAX_RATIO = 64  # FFN columns a hidden unit
# Names that the supported architectures give their sizes, and the largest of each.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "dim", "n_embd", "word_embed_proj_dim", "embedding_size", "d_model"), MAX_SIZE),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", "d_kv"), MAX_SIZE),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_key_value_heads"), MAX_SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "patch_size"), MAX_SIZE),
    **dict.fromkeys(("image_size", "num_channels", "relative_attention_num_buckets"), MAX_SIZE),
    "relative_attention_max_distance": MAX_SIZE,
    "vocab_size": MAX_VOCABULARY,
    "mlp_ratio": MAX_RATIO,
}
_MAY_BE_NULL = dict.fromkeys(("n_inner", "head_dim"), MAX_SIZE)  # which follow from others
_MAY_BE_ZERO = {"type_vocab_size": MAX_SIZE, "num_labels": MAX_SIZE}
_MAY_BE_NONE = {"position_buckets": MAX_SIZE, "max_relative_positions": MAX_SIZE}  # -1, for none, or another default
_SHARES = (
    *("layer_norm_eps", "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"),
    *("attention_dropout", "classifier_dropout", "qa_dropout", "seq_classif_dropout", "dropout_rate"),
)
_NAMES = ("hidden_act", "activation", "feed_forward_proj", "position_embedding_type")
# What would fetch or choose code by name; every model here is built with eager attention.
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# In layers of old checkpoints: causal masks, positions and frequencies, which models compute.
_NO_WEIGHT = re.compile(r"(?:attn|attention)\.(?:masked_)?bias$|(?:inv_freq|position_ids|relative_position_index)$")
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def read_config(path: str, reads: Reads | None = None, **source: Any) -> transformers.PretrainedConfig:
    """Configuration of a local folder, or of a hub id; ``source`` are keywords for the hub.

    ``reads``: what the tower that is meant reads, of a model that has two.

    Raises:
        UnsupportedModelError: not reachable, code of its own, another architecture, or quantized weights.
        CorruptArtifactError: ``config.json`` is damaged.
    """
    return config_of(tower_fields(_fields(path, source), reads, path), path)


def config_of(fields: Mapping[str, Any], path: str) -> transformers.PretrainedConfig:
    """Configuration from the fields of ``config.json``; raises as :func:`read_config`."""
    _check_support(fields, path)
    wrong = [*_wrong_sizes(fields), *_wrong_shares(fields), *_wrong_names(fields), *_wrong_classes(fields)]
    if wrong:
        raise CorruptArtifactError(
            f"expected the settings of a model in config.json of {path}, found {', '.join(wrong)}; copy the folder "
            "again"
        )
    plain = {name: value for name, value in fields.items() if name not in _IMPLEMENTATIONS}
    try:
        config: Any = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(plain)
    except Exception as error:  # transformers trusts the types of fields, so that it may raise anything
        raise CorruptArtifactError(
            f"expected the settings of a {fields['model_type']} model in config.json of {path}, found: "
            f"{type(error).__name__}: {shown(str(error))}; copy the folder again"
        ) from error
    if getattr(config, "torchscript", False):  # it would answer by tuples instead of by names
        config.torchscript = False
    if getattr(config, "sinusoidal_pos_embds", False):  # a loop over positions, for numbers that the weights hold
        config.sinusoidal_pos_embds = False
    return config  # type: ignore[no-any-return]


def _fields(path: str, source: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(path)
    if not os.path.isdir(folder):
        try:
            fields: dict[str, Any] = transformers.PretrainedConfig.get_config_dict(path, **source)[0]
            return fields
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(
                f"expected a local folder or a reachable hub id, found {path!r}: {error}; download it and give the "
                "folder"
            ) from error
    try:
        raw = read_json(folder / "config.json", finite=True)
    except FileNotFoundError:
        raise UnsupportedModelError(f"expected config.json in {folder}, found none; check the path") from None
    except (OSError, ValueError) as error:
        raise CorruptArtifactError(
            f"expected a readable config.json in {path}, found: {error}; copy the folder again"
        ) from error
    if not isinstance(raw, dict):
        raise CorruptArtifactError(
            f"expected a mapping of settings in config.json of {path}, found {type(raw).__name__}; copy the folder "
            "again"
        )
    return raw


def refuse_own_code(fields: Mapping[str, Any], path: str) -> None:
    """Raise :class:`UnsupportedModelError` for a model that brings code; says what transformers has instead."""
    if "auto_map" in fields:
        raise UnsupportedModelError(
            f"expected a model of transformers in {path}, found one with code of its own (auto_map, model type "
            f"{shown(fields.get('model_type'))}), which is never run; {_instead(fields)}"
        )


def _check_support(fields: Mapping[str, Any], path: str) -> None:
    """Refuse what is not built here, before transformers looks at it."""
    refuse_own_code(fields, path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"expected a model that can be pruned in {path}, found {why_unsupported(model_type)}; choose a "
            f"supported model: {CHOICES}"
        )
    if fields.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"expected weights of full precision in {path}, found quantized ones (quantization_config); prune the "
            "model that they were made from"
        )


def _instead(fields: Mapping[str, Any]) -> str:
    """What to do with a model that has code of its own."""
    native = native_type(fields)
    if native is None:
        return "transformers has no type for it: choose a model without"
    if native not in transformers.CONFIG_MAPPING:
        return f"newer versions of transformers have it natively as type {native}: update, and take such a checkpoint"
    support = "can be pruned" if native in ARCHITECTURES else "cannot be pruned here either"
    if native in ARCHITECTURES and ARCHITECTURES[native].causal is not None:
        return (
            f"transformers has the type {native} natively, but such code may let tokens attend to those after them, "
            "and no weight tells: take a checkpoint without auto_map"
        )
    if native == fields.get("model_type"):
        return f"transformers has the type {native} natively, which {support}: remove auto_map if its weights are those"
    return f"transformers has it natively as type {native}, which {support}: take a checkpoint of that type"


def _wrong_sizes(fields: Mapping[str, Any]) -> list[str]:
    least_of = {1: _SIZES, 0: _MAY_BE_ZERO, -1: _MAY_BE_NONE}
    limits = [(name, least, most) for least, sizes in least_of.items() for name, most in sizes.items()]
    limits += [(name, 1, most) for name, most in _MAY_BE_NULL.items() if fields.get(name) is not None]
    return [
        f"{name}: {shown(fields[name])} (expected {least} to {most})"
        for name, least, most in limits
        if name in fields and not all(_is_size(value, least, most) for value in _numbers(name, fields[name]))
    ]


def _wrong_classes(fields: Mapping[str, Any]) -> list[str]:
    classes = fields.get("architectures")
    is_known = classes is None or (isinstance(classes, list) and all(isinstance(each, str) for each in classes))
    return [] if is_known else [f"architectures: {shown(classes)} (expected names of classes)"]


def _numbers(name: str, value: Any) -> list[Any]:
    """The numbers of a size; images may have two."""
    return value if name in ("image_size", "patch_size") and isinstance(value, list) and value else [value]


def _is_size(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _wrong_shares(fields: Mapping[str, Any]) -> list[str]:
    found = {name: fields[name] for name in _SHARES if fields.get(name) is not None}
    return [
        f"{name}: {shown(value)} (expected 0 to 1)"
        for name, value in found.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1
    ]


def _wrong_names(fields: Mapping[str, Any]) -> list[str]:
    found = {name: fields[name] for name in _NAMES if fields.get(name) is not None}
    return [f"{name}: {shown(value)} (expected a name)" for name, value in found.items() if not isinstance(value, str)]


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in safetensors files, from their headers; raises as ``safe_open``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def check_layer_count(config: Any, shapes: Shapes, where: str) -> None:
    """Refuse weights of another number of layers than ``config.json`` says: some would be left out, or random.

    Layers go by their name here, or by what most models call them: names of older checkpoints differ.

    Raises:
        CorruptArtifactError: names the first layer that only one of them has.
    """
    layers = _numbered(_layer_names(config), shapes) or _numbered(_LAYER, shapes)
    expected, found = getattr(config, ARCHITECTURES[config.model_type].config_layers), max(layers.values(), default=-1)
    if layers and found + 1 != expected:
        extra = next((name for name, layer in layers.items() if layer >= expected), "")
        more = f", among them {extra}, which would be left out" if extra else ""
        raise CorruptArtifactError(
            f"expected weights of {expected} layers in {where}, as config.json says, found those of {found + 1}{more}; "
            "correct config.json, or copy the folder again"
        )


def check_all_are_used(config: Any, unexpected: Iterable[str], where: str) -> None:
    """Refuse weights inside layers that the model of ``config.json`` has no place for: it would be another model.

    Masks and positions that old releases stored are no weights.

    Raises:
        CorruptArtifactError: names the first.
    """
    inside = _numbered(_layer_names(config), unexpected)
    left = [name for name in inside if not _NO_WEIGHT.search(name)]
    if left:
        raise CorruptArtifactError(
            f"expected weights in {where} that the model of its config.json uses, found {len(left)} in its layers that "
            f"it does not, the first {min(left)}: adapters, biases or positions that would be left out; correct "
            "config.json, or merge adapters into the weights"
        )


def _layer_names(config: Any) -> re.Pattern[str]:
    """Names of weights inside of layers, as the architecture calls them."""
    return re.compile(rf"(?:^|\.){re.escape(ARCHITECTURES[config.model_type].layers)}\.(\d+)\.")


def _numbered(layer: re.Pattern[str], names: Iterable[str]) -> dict[str, int]:
    return {name: int(match[1]) for name in names if (match := layer.search(name)) is not None}


def check_parameter_count(model_class: Any, config: Any, shapes: Shapes, most: int, **options: Any) -> None:
    """Refuse a configuration of a model with more than ``most`` parameters; ``shapes`` are for the message.

    Buffers count by their bytes, four for one: GPT-2 of transformers 4 has a causal mask in every layer. The model is
    built on the ``meta`` device, which takes no memory.

    Raises:
        CorruptArtifactError: the weights cannot be those of the model.
    """
    with torch.device("meta"):
        model = model_class(config, **options)
    declared = sum(parameter.numel() for parameter in model.parameters())
    declared += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()) // 4
    if declared > most:
        stored = sum(torch.Size(shape).numel() for shape in shapes.values())
        raise CorruptArtifactError(
            f"expected weights of the {model_class.__name__} that config.json describes ({declared:,} parameters), "
            f"found {stored:,}; copy the folder again"
        )


def first_not_finite(model: torch.nn.Module) -> str | None:
    """Name of a tensor with NaN or infinite weights; None if all are finite."""
    tensors = ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point())
    return next((name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())), None)
