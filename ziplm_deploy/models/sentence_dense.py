"""Dense layers that follow the pooling of a sentence-transformers model: as settings, as modules, and as files.

Where they hang on a model: :func:`exporters.heads.sentence_dense`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from exporters.heads import sentence_dense
from ziplm_deploy.artifacts import write_bytes_with, write_text
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.config_file import Shapes, stored_shapes
from ziplm_deploy.models.location import find_file

Activation = Literal["Identity", "Tanh", "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Sigmoid"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
PREFIX = "sentence_dense."  # of the names of their weights
WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"


class DenseLayer(BaseModel):
    """A linear layer with an activation: ``[batch, in_features]`` to ``[batch, out_features]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_features: int = Field(ge=1, le=2**20)
    out_features: int = Field(ge=1, le=2**20)
    bias: bool = True
    activation: Activation = "Tanh"  # class of torch.nn, with its defaults

    def build(self) -> list[nn.Module]:
        """Linear and activation, with weights still to be loaded."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias)
        activation = getattr(nn, self.activation)()
        return [linear] if self.activation == "Identity" else [linear, activation]


def attach(model: nn.Module, layers: tuple[DenseLayer, ...], shapes: Shapes) -> None:
    """Give a model these layers, with weights still to be loaded; no layers: leave it as it is.

    Args:
        shapes: of the weights that there are, by their names in ``model.state_dict()``.

    Raises:
        ValueError: the weights are those of other layers.
    """
    if not layers:
        return
    with torch.device("meta"):  # no memory before it is known that there are weights of this size
        planned = nn.Sequential(*(module for layer in layers for module in layer.build()))
    wanted = {f"{PREFIX}{name}": tuple(tensor.shape) for name, tensor in planned.state_dict().items()}
    found = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
    if wanted != found:
        name = min(set(wanted.items()) ^ set(found.items()))[0]
        raise ValueError(f"{name} of shape {found.get(name)}, expected {wanted.get(name)}")
    model.sentence_dense = planned.to_empty(device="cpu").eval()


def layers_of_dense(model: nn.Module) -> tuple[DenseLayer, ...]:
    """The settings of a model's Dense layers."""
    modules = list(sentence_dense(model) or ())
    found: list[DenseLayer] = []
    for linear, after in itertools.zip_longest(modules, modules[1:], fillvalue=nn.Identity()):
        if isinstance(linear, nn.Linear):
            activation = "Identity" if isinstance(after, nn.Linear) else type(after).__name__
            fields = {"in_features": linear.in_features, "out_features": linear.out_features}
            found.append(
                DenseLayer.model_validate({**fields, "bias": linear.bias is not None, "activation": activation})
            )
    return tuple(found)


def embedding_size(model: nn.Module) -> int:
    """Numbers in an embedding by this model."""
    layers = layers_of_dense(model)
    config: Any = model.config
    size = getattr(config, "projection_size", None) or config.hidden_size  # SigLIP's texts end in a linear of their own
    return layers[-1].out_features if layers else int(size)


def load_layers(
    model: nn.Module, layers: tuple[DenseLayer, ...], source: str, folders: tuple[str, ...], revision: str | None
) -> None:
    """Give a model these layers, if any, with the weights in the folders of a sentence-transformers model, one a layer.

    Raises:
        UnsupportedModelError: weights are missing, or pickled only.  CorruptArtifactError: they do not fit.
    """
    if not layers:
        return
    files = [_weights_file(source, folder, revision) for folder in folders]
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for position, file in zip(_positions(layers), files, strict=True):
            named = stored_shapes([file])
            shapes |= {f"{PREFIX}{position}.{name.removeprefix('linear.')}": named[name] for name in named}
        attach(model, layers, shapes)
        for position, file in zip(_positions(layers), files, strict=True):
            tensors = {name.removeprefix("linear."): tensor for name, tensor in load_file(file).items()}
            model.get_submodule(f"{PREFIX}{position}").load_state_dict(tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptArtifactError(
            f"expected the weights of its Dense layers in {', '.join(folders)} of {source}, found: {error}; get the "
            "model anew"
        ) from error


def _positions(layers: tuple[DenseLayer, ...]) -> list[int]:
    """Where the linears of these layers stand among linears and activations."""
    return list(itertools.accumulate((1 if layer.activation == "Identity" else 2 for layer in layers[:-1]), initial=0))


def _weights_file(source: str, folder: str, revision: str | None) -> Path:
    file = find_file(source, f"{folder}/{WEIGHTS}", revision)
    if file is None:
        raise UnsupportedModelError(_no_weights(source, folder, revision))
    return file


def _no_weights(source: str, folder: str, revision: str | None) -> str:
    if find_file(source, f"{folder}/{PICKLE}", revision) is None:
        return f"expected {WEIGHTS} in {source}/{folder}, found no weights; get the model anew"
    code = (
        "import torch; from safetensors.torch import save_file as s; "
        f"s(torch.load({PICKLE!r}, weights_only=True), {WEIGHTS!r})"
    )
    return (
        f"expected {WEIGHTS} in {source}/{folder}, found only pickled weights ({PICKLE}), which are not opened here; "
        f'convert them in that folder: python -c "{code}"'
    )


def write_folders(model: nn.Module, folder: Path, first: int) -> list[str]:
    """Write a model's Dense layers as sentence-transformers reads them, and give their folders: ``2_Dense``, …"""
    linears = [module for module in sentence_dense(model) or () if isinstance(module, nn.Linear)]
    names = [f"{first + number}_Dense" for number in range(len(linears))]
    for name, layer, linear in zip(names, layers_of_dense(model), linears, strict=True):
        kind = "linear" if layer.activation == "Identity" else "activation"
        config = {
            **layer.model_dump(exclude={"activation"}),
            "activation_function": f"torch.nn.modules.{kind}.{layer.activation}",
        }
        tensors = {f"linear.{key}": tensor.detach().contiguous() for key, tensor in linear.state_dict().items()}
        write_text(folder / name / "config.json", json.dumps(config, indent=1) + "\n")
        write_bytes_with(folder / name / WEIGHTS, lambda path, tensors=tensors: save_file(tensors, path))  # type: ignore[misc]
    return names
