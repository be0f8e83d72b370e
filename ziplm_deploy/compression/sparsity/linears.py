"""The linears whose weights may become zero."""

from __future__ import annotations

from torch import nn

from ziplm_deploy.models.modules import layers_of


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the encoder's layers by its dotted name in ``model``, in the order of the model.

    Query, key, value, attention output and both FFN linears; a dropped module has none.
    """
    layers = layers_of(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return {f"{prefix}.{name}": m for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
