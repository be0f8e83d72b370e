"""Models of transformers, just built or loaded, in the form that everything here works on."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ziplm_deploy.models.architectures import architecture_of
from ziplm_deploy.models.causal import as_linears

_Module = TypeVar("_Module", bound=nn.Module)


def adapted(model: _Module) -> _Module:
    """Change a model in place: linears for ``Conv1D``, and what its architecture asks for; its answers stay.

    Raises:
        UnsupportedModelError: as :func:`ziplm_deploy.models.architectures.architecture_of`.
    """
    as_linears(model)
    adapt = architecture_of(model.config).adapt  # type: ignore[arg-type]
    if adapt is not None:
        adapt(model)
    return model
