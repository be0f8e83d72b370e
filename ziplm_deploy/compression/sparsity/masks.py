"""Zeros that must stay: held in training, made at random where only latency counts, and found again in ONNX files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types of its own
from onnx import numpy_helper
from torch import Tensor, nn

from exporters.names import linear_of
from ziplm_deploy.compression.sparsity.sparsegpt import GROUP_SIZES
from ziplm_deploy.errors import CorruptArtifactError, NumericalError, ParityError, UsageError
from ziplm_deploy.models.modules import layer_linears
from ziplm_deploy.recipe import SparsityConfig

Bools = np.ndarray[Any, np.dtype[np.bool_]]
# Place of the weight, and of its zero point, among the inputs of the nodes that multiply by it.
_PRODUCTS: dict[str, tuple[int, int | None]] = {"MatMul": (1, None), "Gemm": (1, None), "MatMulInteger": (1, 3)}


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Bool [outputs, inputs] of every linear in the layers, True where its weight is zero; by dotted name."""
    return {name: linear.weight.detach() == 0 for name, linear in layer_linears(model).items()}


def sparsity_of(model: nn.Module) -> float:
    """Share of zeros in the weights of all linears in the layers; 0 if there are none."""
    masks = zero_masks(model).values()
    return sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))


@contextlib.contextmanager
def zeros_held(model: nn.Module, masks: dict[str, Tensor]) -> Iterator[None]:
    """Keep the masked weights of ``model`` exactly zero while an optimizer that starts in the block trains it.

    Their gradients become zero, so that AdamW's moments and its weight decay leave them where they are. That is
    checked at the end: an optimizer that carries momentum from before the block would move them.

    Raises:
        UsageError: masks of another model, or a masked weight is not zero at the start.
        NumericalError: a masked weight is no longer zero at the end.
    """
    linears = layer_linears(model)
    for name, mask in masks.items():
        if name not in linears or linears[name].weight.shape != mask.shape:
            found = list(linears[name].weight.shape) if name in linears else "no such linear"
            raise UsageError(
                f"expected {name} {list(mask.shape)} as in the mask, found {found}; take zero_masks of this model"
            )
        if _changed(linears[name], mask):
            raise UsageError(
                f"expected zeros in {name} wherever its mask says so, found {_changed(linears[name], mask)} other "
                "weights; take zero_masks of this model"
            )
    handles = [
        linears[name].weight.register_hook(_ZeroGradient(mask))  # type: ignore[no-untyped-call]
        for name, mask in masks.items()
        if linears[name].weight.requires_grad  # a frozen weight takes no hook and needs none
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, mask in masks.items():
        if _changed(linears[name], mask):
            raise NumericalError(
                f"expected the {int(mask.sum())} zeros of {name} to stay, found {_changed(linears[name], mask)} moved; "
                "make the optimizer after the masks are held"
            )


class _ZeroGradient:
    """Gradient hook; the mask follows the weights to their device once."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self._mask = self._mask.to(gradient.device)
        return gradient.masked_fill(self._mask, 0)


def _changed(linear: nn.Linear, mask: Tensor) -> int:
    weight = linear.weight.detach()
    return int((weight != 0).logical_and_(mask.to(weight.device)).sum())


def random_masks(model: nn.Module, config: SparsityConfig, seed: int) -> None:
    """Zero weights of every linear at random places, in place: its sparsity and pattern, for timing alone.

    Every linear gets the sparsity of the recipe, whatever its ``distribution``. A model without layers stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for linear in layer_linears(model).values():
        zeros = _random_zeros(linear.weight, config, generator)
        with torch.no_grad():
            linear.weight.masked_fill_(zeros.to(linear.weight.device), 0)


def _random_zeros(weight: Tensor, config: SparsityConfig, generator: torch.Generator) -> Tensor:
    (r, d), m = weight.shape, GROUP_SIZES[config.pattern]
    n = -(-d // m)
    chosen = torch.zeros(r * n, dtype=torch.bool)
    chosen[torch.randperm(r * n, generator=generator)[: round(config.sparsity * r * n)]] = True
    return chosen.reshape(r, n, 1).expand(r, n, m).reshape(r, n * m)[:, :d]


def check_masks_in_onnx(path: Path, model: nn.Module) -> None:
    """The file multiplies by the zeros of ``model``: by exactly these if its weights are floats, at least by these if
    they are integers, to which small weights round as well.

    A weight is the right-hand side of the MatMul, Gemm or MatMulInteger node that carries the linear's name: an
    initializer, or integers behind a DequantizeLinear. Zero in integers is the zero point.

    Raises:
        ParityError: other zeros, or a linear is not in the file; names it.
        CorruptArtifactError: the file is missing or no ONNX model.
    """
    try:
        graph = _Graph(onnx.load(str(path)).graph)
    except (OSError, DecodeError) as error:
        raise CorruptArtifactError(f"expected an ONNX model in {path}, found: {error}; export it again") from error
    for name, mask in zero_masks(model).items():
        found, exact = graph.zeros(name, path)
        expected: Bools = mask.T.cpu().numpy()  # [inputs, outputs], as the file has it
        if found.shape != expected.shape:
            raise ParityError(
                f"expected {name} with {list(expected.shape)} weights in {path}, found {list(found.shape)}; "
                "export this model again"
            )
        lost, new = int((expected & ~found).sum()), int((found & ~expected).sum())
        if lost or (new and exact):
            raise ParityError(
                f"expected the {int(expected.sum())} zeros of {name} in {path}, found {lost} of them lost and {new} "
                "others; export this model again"
            )


class _Graph:
    """Weights of an ONNX graph by the name of the linear that they belong to."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._arrays = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {output: node for node in graph.node for output in node.output}
        products = {linear_of(node.name): node for node in graph.node if node.op_type in _PRODUCTS}
        self._products = {name: node for name, node in products.items() if name is not None}

    def zeros(self, name: str, path: Path) -> tuple[Bools, bool]:
        """Where the weight of a linear is zero, [inputs, outputs], and whether small weights are kept apart from 0."""
        node = self._products.get(name)
        weight = None if node is None else self._weight(node)
        if node is None or weight is None:
            what = "no such node" if node is None else f"{node.op_type} node {node.name} without constant weights"
            raise ParityError(
                f"expected {name} in {path} as a node with constant weights, found {what}; export this model again"
            )
        values, zero_point, axis = weight
        if zero_point.ndim and zero_point.size > 1:
            zero_point = zero_point.reshape([-1 if index == axis % values.ndim else 1 for index in range(values.ndim)])
        found: Bools = values == zero_point
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        return found.T if transposed else found, not np.issubdtype(values.dtype, np.integer)

    def _weight(self, node: onnx.NodeProto) -> tuple[Any, Any, int] | None:
        """Values, zero point and the axis along which that varies; ``None`` if the weight is not constant."""
        place, zero_place = _PRODUCTS[node.op_type]
        source, axis = node.input[place], -1
        producer = self._producers.get(source)
        if producer is not None and producer.op_type == "DequantizeLinear":
            axis = next((a.i for a in producer.attribute if a.name == "axis"), 1)
            node, source, zero_place = producer, producer.input[0], 2
        values = self._constant(source)
        if values is None:
            return None
        has_point = zero_place is not None and len(node.input) > zero_place and node.input[zero_place]
        zero_point = self._constant(node.input[zero_place]) if zero_place is not None and has_point else np.zeros(())
        return None if zero_point is None else (values, zero_point, axis)

    def _constant(self, name: str) -> Any | None:
        """Array of an initializer, also behind Identity nodes."""
        producer = self._producers.get(name)
        while producer is not None and producer.op_type == "Identity":
            name = producer.input[0]
            producer = self._producers.get(name)
        return numpy_helper.to_array(self._arrays[name]) if name in self._arrays else None
