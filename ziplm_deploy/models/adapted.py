"""Models of transformers, just built or loaded, in the form that everything here works on."""

from __future__ import annotations

from typing import Any, TypeVar

import transformers
from torch import nn

from ziplm_deploy.errors import UnsupportedModelError
from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import as_linears
from ziplm_deploy.models.image_positions import fix_positions
from ziplm_deploy.models.layer_scale import fold_layer_scales
from ziplm_deploy.models.modules import layers_of

_Module = TypeVar("_Module", bound=nn.Module)


def model_class(config: Any, auto_class: str) -> type[Any]:
    """Class of transformers that an auto class, such as ``AutoModel``, stands for.

    Raises:
        UnsupportedModelError: there is none, or it has a decoder; and as
            :func:`ziplm_deploy.models.architectures.architecture_of`.
    """
    named = architecture_of(config).model_classes.get(auto_class, "")
    if named:
        found: type[Any] = getattr(transformers, named)
        return found
    classes = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    if named is None or not classes:
        raise UnsupportedModelError(
            f"expected a model with a head for {auto_class}, found a {config.model_type}"
            f"{' whose class for it has a decoder' if classes else ''}; choose another task"
        )
    # The one that the configuration names, where several do a task: distilled DeiTs have a second head.
    found = next((each for each in classes if each.__name__ in (config.architectures or ())), classes[0])
    return found


def adapted(model: _Module) -> _Module:
    """Change a model in place, and give it back; its answers stay, but for rounding.

    Every linear is a :class:`torch.nn.Linear`, no layer scale is left, positions are those of one image size, and what
    its architecture asks for is done.

    Raises:
        UnsupportedModelError: as :func:`ziplm_deploy.models.architectures.architecture_of`.
    """
    fix_positions(fold_layer_scales(as_linears(model)))
    adapt = architecture_of(model.config).adapt  # type: ignore[arg-type]
    if adapt is not None:
        adapt(model)
    _name_attention_kinds(model)
    return model


def _name_attention_kinds(model: nn.Module) -> None:
    """Let layers say which attention they have: Qwen's of transformers 5 leave that to the configuration."""
    kinds = getattr(model.config, "layer_types", None) or ()
    if len(set(kinds)) > 1:
        for layer, kind in zip(layers_of(model), kinds, strict=False):
            if not hasattr(layer, "attention_type"):
                layer.attention_type = kind
