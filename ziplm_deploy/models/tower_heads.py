"""How towers of CLIP and SigLIP make one embedding of what they read.

CLIP compares a text by the vector of its last token, which has read all others, and an image by that of its first,
each times a matrix: pooling and a Dense layer, in the words of sentence-transformers. SigLIP's towers end in a head of
their own: over the last place of a text, which is filled up to one length, and over all patches of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.architectures.towers import WHOLE
from ziplm_deploy.models.location import find_file
from ziplm_deploy.models.sentence_dense import PREFIX, WEIGHTS, DenseLayer, attach
from ziplm_deploy.models.two_towers import Reads, inner_settings
from ziplm_deploy.recipe import Pooling

_PROJECTIONS: dict[Reads, str] = {"text": "text_projection.weight", "image": "visual_projection.weight"}
_WITH_PROJECTION: dict[Reads, str] = {"text": "CLIPTextModelWithProjection", "image": "CLIPVisionModelWithProjection"}
_WIDTHS: dict[Reads, int] = {"text": 512, "image": 768}  # hidden sizes where a configuration says nothing


@dataclass(frozen=True)
class TowerHead:
    """Pooling of a tower, and the layer after it if there is one."""

    pooling: Pooling
    dense: tuple[DenseLayer, ...] = ()


def tower_head(fields: Mapping[str, Any], reads: Reads) -> TowerHead | None:
    """Head of the tower that reads texts or images, by ``config.json`` of a whole model or of the tower.

    None for other models, and for the other tower alone.

    Raises:
        UnsupportedModelError: SigLIP's tower of images without its head.
        pydantic.ValidationError: sizes that no layer can have.
    """
    model_type = fields.get("model_type")
    for kind, towers in WHOLE.items():
        name, tower_type = towers[reads]
        if model_type not in (kind, tower_type):
            continue
        inner = inner_settings(fields, name, tower_type) if model_type == kind else fields
        settings = inner if isinstance(inner, dict) else {}
        if kind == "clip":
            projection = _projection(fields, settings, reads)
            return TowerHead("lasttoken" if reads == "text" else "pooler", () if projection is None else (projection,))
        if settings.get("vision_use_head") is False:
            raise UnsupportedModelError(
                "expected a SigLIP whose head makes one vector of an image, found vision_use_head: false; choose "
                "another model"
            )
        return TowerHead("pooler")
    return None


def _projection(fields: Mapping[str, Any], settings: Mapping[str, Any], reads: Reads) -> DenseLayer | None:
    """CLIP's projection; None where a tower was saved without it."""
    is_whole = fields.get("model_type") == "clip"
    classes = fields.get("architectures")
    if not is_whole and not (isinstance(classes, list) and _WITH_PROJECTION[reads] in classes):
        return None
    return DenseLayer.model_validate(
        {
            "in_features": settings.get("hidden_size", _WIDTHS[reads]),
            "out_features": (fields if is_whole else settings).get("projection_dim", 512),
            "bias": False,
            "activation": "Identity",
        }
    )


def load_projection(model: nn.Module, layer: DenseLayer, reads: Reads, source: str, revision: str | None) -> None:
    """Give one of CLIP's towers its projection as a Dense layer, with the weights of its checkpoint.

    Raises:
        UnsupportedModelError: there are no such weights.  CorruptArtifactError: they do not fit.
    """
    name = _PROJECTIONS[reads]
    file = find_file(source, WEIGHTS, revision)
    if file is None:
        raise UnsupportedModelError(f"expected {name} in {source}/{WEIGHTS}, found no such file; merge its parts")
    try:
        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(name)
        attach(model, (layer,), {f"{PREFIX}0.weight": tuple(weight.shape)})
        model.get_submodule(f"{PREFIX}0").load_state_dict({"weight": weight})
    except (SafetensorError, ValueError) as error:
        raise CorruptArtifactError(
            f"expected {name} of a tower in {file}, found: {error}; get the model anew"
        ) from error
