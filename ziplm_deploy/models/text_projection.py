"""The projection of CLIP's texts, as a Dense layer after pooling.

CLIP compares a text by the vector of its last token, which has read all others, times a matrix ``text_projection``:
last-token pooling and a Dense layer, in the words of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.location import find_file
from ziplm_deploy.models.sentence_dense import PREFIX, WEIGHTS, DenseLayer, attach

_PROJECTION = "text_projection.weight"


def projection_of(fields: Mapping[str, Any]) -> DenseLayer | None:
    """The projection of CLIP's text tower, by ``config.json`` of a whole model or of the tower; None if it has none."""
    whole = fields.get("model_type") == "clip"
    if not whole and "CLIPTextModelWithProjection" not in (fields.get("architectures") or ()):
        return None
    settings = fields.get("text_config") if whole else fields
    sizes = settings if isinstance(settings, dict) else {}
    return DenseLayer.model_validate(
        {
            "in_features": sizes.get("hidden_size", 512),  # where they say nothing: as in transformers
            "out_features": sizes.get("projection_dim", 512),
            "bias": False,
            "activation": "Identity",
        }
    )


def load_projection(model: nn.Module, layer: DenseLayer, source: str, revision: str | None) -> None:
    """Give a text tower its projection as a Dense layer, with the weights of its checkpoint.

    Raises:
        UnsupportedModelError: there are no such weights.  CorruptArtifactError: they do not fit.
    """
    file = find_file(source, WEIGHTS, revision)
    if file is None:
        raise UnsupportedModelError(
            f"expected {_PROJECTION} in {source}/{WEIGHTS}, found no such file; merge its parts"
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(_PROJECTION)
        attach(model, (layer,), {f"{PREFIX}0.weight": tuple(weight.shape)})
        model.get_submodule(f"{PREFIX}0").load_state_dict({"weight": weight})
    except (SafetensorError, ValueError) as error:
        raise CorruptArtifactError(
            f"expected {_PROJECTION} of a text tower in {file}, found: {error}; get the model anew"
        ) from error
