"""A static QDQ file as the integer graph that DeepSparse has fast kernels for.

::

    x ─ QuantizeLinear(s_a, z_a) ─ DequantizeLinear ┐
    W (int8) ─ DequantizeLinear(s_w) ───────────────┴ MatMul ─ Add(bias)                             before
    x ─ QuantizeLinear(s_a, z_a) ─ MatMulInteger(W, z_a, 0) ─ Cast(float) ─ Mul(s_a·s_w) ─ Add(bias)    after

Both compute the same up to float32 rounding. Linears that read one tensor with one scale share its QuantizeLinear.
Where other nodes read a dequantized activation, too, that pair stays for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import helper, numpy_helper

from exporters.encoder import ExportError
from exporters.files import atomic_path

MAX_OPSET, MAX_IR = 16, 9  # later opsets fall back to slow kernels or are refused


def to_integer_matmul(source: Path, destination: Path) -> None:
    """Write the static QDQ file ``source`` with MatMulInteger in place of its quantized MatMuls; whole or not at all.

    The new nodes are called ``<name of the MatMul>_quant``.

    Raises:
        ExportError: no ONNX file, dynamic shapes, an opset above 16, no quantized MatMul, or one that is not of the
            form above: uint8 activation and constant symmetric int8 weight with one scale each.
        OSError: the file cannot be written.
    """
    try:
        model = onnx.load(str(source))
    except (OSError, DecodeError) as error:
        raise ExportError(f"expected an ONNX file at {source}, found: {error}; quantize the model again") from error
    _check_header(model, source)
    _Rewriter(model.graph).run(source)
    model.ir_version = min(model.ir_version, MAX_IR)
    used = {node.domain for node in model.graph.node}
    imports = [item for item in model.opset_import if item.domain in used or item.domain in ("", "ai.onnx")]
    kept = [helper.make_opsetid(item.domain, item.version) for item in imports]
    del model.opset_import[:]  # quantizers import domains that no node uses, which DeepSparse refuses
    model.opset_import.extend(kept)
    with atomic_path(destination) as temporary:
        onnx.save(model, str(temporary))


def _check_header(model: onnx.ModelProto, source: Path) -> None:
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset > MAX_OPSET:
        raise ExportError(f"expected opset <= {MAX_OPSET} in {source}, found {opset}; export with opset 16")
    for tensor in model.graph.input:
        if not all(axis.dim_value > 0 for axis in tensor.type.tensor_type.shape.dim):
            raise ExportError(f"expected static shapes in {source}, found free axes of {tensor.name}; export static")


class _Rewriter:
    """Replaces the MatMuls of a graph, in place."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {item.name: item for item in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.quantized: dict[tuple[str, float, int], str] = {}  # (tensor, scale, zero point) → uint8 tensor
        self.nodes: list[onnx.NodeProto] = []
        self.added: list[onnx.TensorProto] = []

    def run(self, source: Path) -> None:
        n_replaced = 0
        for node in self.graph.node:
            dequantized = [self._is_dequantized(name) for name in node.input]
            if node.op_type != "MatMul" or not any(dequantized):
                self.nodes.append(node)
            elif all(dequantized):
                self._replace(node)
                n_replaced += 1
            else:
                raise ExportError(
                    f"expected both inputs of {node.name} quantized, or none, found one; quantize the model again"
                )
        if not n_replaced:
            raise ExportError(
                f"expected quantized MatMul nodes in {source}, found none; quantize it to the static QDQ form first"
            )
        self._finish()

    def _is_dequantized(self, name: str) -> bool:
        return name in self.producers and self.producers[name].op_type == "DequantizeLinear"

    def _replace(self, node: onnx.NodeProto) -> None:
        integers, scale_a, zero_point = self._activation(node)
        weight, scale_w = self._weight(node)
        name = f"{node.name or node.output[0]}_quant"
        zero_points = [
            self._add(f"{name}_zero_point_a", np.uint8(zero_point)),
            self._add(f"{name}_zero_point_w", np.int8(0)),
        ]
        scale = self._add(f"{name}_scale", np.float32(np.float32(scale_a) * np.float32(scale_w)))
        product, real = f"{name}_product", f"{name}_real"
        self.nodes += [
            helper.make_node("MatMulInteger", [integers, weight, *zero_points], [product], name=name),
            helper.make_node("Cast", [product], [real], name=f"{name}_cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [real, scale], [node.output[0]], name=f"{name}_mul"),
        ]

    def _activation(self, node: onnx.NodeProto) -> tuple[str, float, int]:
        """uint8 tensor, scale and zero point of the left input."""
        dequantize = self.producers[node.input[0]]
        quantize = self.producers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            raise ExportError(
                f"expected a QuantizeLinear before the left input of {node.name}, found none; quantize the model again"
            )
        scale, zero_point = self._parameters(node, quantize, np.uint8)
        if (scale, zero_point) != self._parameters(node, dequantize, np.uint8) or zero_point.dtype != np.uint8:
            raise ExportError(
                f"expected one uint8 scale and zero point around the left input of {node.name}, found "
                f"{zero_point.dtype} or two different; quantize activations to unsigned integers (QUInt8)"
            )
        key = (quantize.input[0], float(scale), int(zero_point))
        if key not in self.quantized:
            name = f"{key[0]}_uint8_{len(self.quantized)}"
            parameters = [self._add(f"{name}_scale", scale), self._add(f"{name}_zero_point", zero_point)]
            self.nodes.append(helper.make_node("QuantizeLinear", [key[0], *parameters], [name], name=f"{name}_node"))
            self.quantized[key] = name
        return self.quantized[key], key[1], key[2]

    def _weight(self, node: onnx.NodeProto) -> tuple[str, float]:
        """Name of the int8 constant ``[in, out]`` and its scale."""
        dequantize = self.producers[node.input[1]]
        constant = self.constants.get(dequantize.input[0])
        if constant is None or constant.data_type != onnx.TensorProto.INT8:
            raise ExportError(
                f"expected a constant int8 weight in {node.name}, found another right input; quantize only MatMuls "
                "with constant weights (MatMulConstBOnly), to QInt8"
            )
        scale, zero_point = self._parameters(node, dequantize, np.int8)
        if zero_point.dtype.kind == "i" and zero_point == 0:
            return constant.name, float(scale)
        raise ExportError(
            f"expected a symmetric weight in {node.name}, found the zero point {zero_point}; quantize weights so"
        )

    def _parameters(
        self, node: onnx.NodeProto, pair: onnx.NodeProto, default: type[np.integer[Any]]
    ) -> tuple[np.float32, np.integer[Any]]:
        """Scale and zero point (a zero of type ``default`` where none is given) of a node of a pair before ``node``."""
        names = [name for name in pair.input[1:] if name]
        if any(name not in self.constants for name in names):
            raise ExportError(
                f"expected constant scales around {node.name}, found computed ones (dynamic INT8); quantize statically"
            )
        scale, *rest = (numpy_helper.to_array(self.constants[name]) for name in names)
        zero_point = rest[0] if rest else np.zeros(scale.shape, default)
        if scale.size != 1 or zero_point.size != 1:
            raise ExportError(
                f"expected one scale for each tensor around {node.name}, found {scale.size}; quantize per tensor "
                "(per_channel: false)"
            )
        return np.float32(scale.item()), zero_point.flat[0]

    def _add(self, name: str, value: np.generic) -> str:
        self.added.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _finish(self) -> None:
        """Store the nodes without those that nobody reads any more, and without unread constants."""
        read = {output.name for output in self.graph.output}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):  # in topological order: readers come first here
            is_pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if not is_pair or read.intersection(node.output):
                kept.append(onnx.NodeProto.FromString(node.SerializeToString()))  # the originals go with the graph's
                read.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(self.added)
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in read:
                del self.graph.initializer[index]
