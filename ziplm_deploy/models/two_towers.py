"""One tower out of a checkpoint that holds two: its settings and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from transformers import CONFIG_MAPPING

from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.architectures.towers import WHOLE

Reads = Literal["text", "image"]
TOWER_TYPES = frozenset(model_type for towers in WHOLE.values() for _, model_type in towers.values())
_OF_ALL = ("auto_map", "quantization_config")  # settings of a whole model that hold for its towers
_OTHERS = {"text": "vision_model.", "vision": "text_model."}  # how weights of the other tower begin
_Value = TypeVar("_Value")


def tower_fields(fields: Mapping[str, Any], reads: Reads | None, path: str) -> Mapping[str, Any]:
    """Settings of the tower that reads texts or images; those of a model without towers as they are.

    Raises:
        UnsupportedModelError: two towers, and nothing that chooses one.
        CorruptArtifactError: the settings of the tower are missing.
    """
    towers = WHOLE.get(str(fields.get("model_type")))
    if towers is None:
        return fields
    if reads is None:
        raise UnsupportedModelError(
            f"expected one model in {path}, found the two towers of a {fields['model_type']}; name one "
            "(inspect --tower text or image; in a recipe, model.task sentence-similarity or image-feature-extraction)"
        )
    name, model_type = towers[reads]
    inner = inner_settings(fields, name, model_type)
    if not isinstance(inner, dict):
        raise CorruptArtifactError(
            f"expected the settings of a tower as {name} in config.json of {path}, found {type(inner).__name__}; copy "
            "the folder again"
        )
    return {**inner, "model_type": model_type, **{key: fields[key] for key in _OF_ALL if key in fields}}


def inner_settings(fields: Mapping[str, Any], name: str, model_type: str) -> Any:
    """Settings of one tower as transformers reads them; anything else than a mapping where they are missing.

    Old files of CLIP have ``text_config_dict`` beside ``text_config``: that one counts, with its defaults.
    """
    inner, older = fields.get(name), fields.get(f"{name}_dict")
    if fields.get("model_type") != "clip" or not isinstance(older, dict):
        return inner
    return {**(inner if isinstance(inner, dict) else {}), **CONFIG_MAPPING[model_type]().to_dict(), **older}


def without_other_tower(tensors: Mapping[str, _Value], model_type: str) -> dict[str, _Value]:
    """Tensors by name, without those of the tower beside one of this type."""
    other = _OTHERS[model_type.split("_")[1]] if model_type in TOWER_TYPES else None
    return {name: value for name, value in tensors.items() if other is None or not name.startswith(other)}
