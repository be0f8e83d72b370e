"""Pruning methods, one page each: ``layer_drop.py`` is ``prune.method: layer-drop``."""

from __future__ import annotations

import importlib

from ziplm_deploy.errors import RecipeError
from ziplm_deploy.pruning.methods.base import Method, OutputLinear
from ziplm_deploy.recipe.choices import page_names

__all__ = ["METHODS", "Method", "OutputLinear", "get_method"]

METHODS: tuple[str, ...] = tuple(name for name in page_names("pruning", "methods"))


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        RecipeError: no such method; lists those there are.
    """
    if name not in METHODS:
        raise RecipeError(f"expected a method of {', '.join(METHODS)}, found {name!r}; correct prune.method")
    method = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
    assert isinstance(method, Method)
    return method
