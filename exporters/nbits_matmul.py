"""Linears whose weights alone have 8 or 4 bits: MatMulNBits, a contrib operator of ONNX Runtime.

::

    x ─ MatMul(W) ────────────── …    before; of a tied head: Gemm with the transpose of the embedding
    x ─ MatMulNBits(Q, s) ────── …    after

======  ============================  ==========================================================================
symbol  shape                         meaning
======  ============================  ==========================================================================
W       [out, in]                     weight as models have it; blocks are of neighbouring inputs
Q       uint8 [out, blocks, bytes]    round(W / s) + 2^(bits − 1); two integers a byte of 4 bits, the first in the low
                                      half
s       float32 [out, blocks]         scale: what has the largest magnitude in its block becomes −2^(bits − 1)
======  ============================  ==========================================================================

A zero stays zero. The scales are those of ONNX Runtime's own quantizer, whose module needs further packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from exporters.encoder import ExportError

BLOCK_SIZE = 32
# Oldest release of ONNX Runtime that runs these bits on any CPU. 1.22 knows 8 only where its fast kernel fits the CPU.
OLDEST_ENGINE = {8: "1.23", 4: "1.20"}
OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"
# Activations are rounded to int8 in each block, and integers multiplied. Without it kernels compute in float32, with
# 8 bits far slower than a plain MatMul.
_INT8_COMPUTE = 4


@dataclass(frozen=True)
class BlockWeights:
    """A rounded weight ``[out, in]``.

    Attributes:
        integers: uint8 ``[out, blocks, BLOCK_SIZE]``, the last block filled up with zeros of the weight.
        scales: float32 ``[out, blocks]``.
    """

    integers: NDArray[np.uint8]
    scales: NDArray[np.float32]
    n_inputs: int
    bits: int

    @property
    def packed(self) -> NDArray[np.uint8]:
        """Integers as the operator reads them, ``[out, blocks, BLOCK_SIZE * bits / 8]``."""
        if self.bits == 8:
            return self.integers
        return (self.integers[..., 0::2] | (self.integers[..., 1::2] << 4)).astype(np.uint8)

    @property
    def weight(self) -> NDArray[np.float32]:
        """Weight that the integers stand for, ``[out, in]``."""
        steps = self.integers.astype(np.float32) - np.float32(2 ** (self.bits - 1))
        values: NDArray[np.float32] = steps * self.scales[..., None]
        return values.reshape(len(values), -1)[:, : self.n_inputs]


def round_blocks(weight: NDArray[np.float32], bits: int) -> BlockWeights:
    """Round a weight ``[out, in]`` to integers of ``bits`` bits with a scale for each block of inputs.

    Raises:
        ExportError: other bits than 8 or 4.
    """
    if bits not in OLDEST_ENGINE:
        raise ExportError(f"expected 8 or 4 bits a weight, found {bits}; choose one of them")
    n_outputs, n_inputs = weight.shape
    limit = 2 ** (bits - 1)
    filled = np.pad(weight.astype(np.float32, copy=False), ((0, 0), (0, -n_inputs % BLOCK_SIZE)))
    blocks = filled.reshape(n_outputs, -1, BLOCK_SIZE)  # [out, blocks, block]
    scales = block_scales(blocks, bits)[..., None]  # [out, blocks, 1]
    ratios = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    integers = (ratios.round() + limit).clip(0, 2 * limit - 1).astype(np.uint8)
    return BlockWeights(integers, scales[..., 0], n_inputs, bits)


def block_scales(blocks: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Scale of each block, float32 [...], of weights ``[..., block]``; 0 where all of them are."""
    places = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scales: NDArray[np.float32] = np.take_along_axis(blocks, places, axis=-1)[..., 0] / np.float32(-(2 ** (bits - 1)))
    return scales


def to_nbits_matmul(
    model: onnx.ModelProto, bits: Mapping[str, int], rounded: Mapping[str, BlockWeights] | None = None
) -> None:
    """Put MatMulNBits in place of products with constant weights, in place.

    Args:
        bits: 8 or 4 by the name of each node: a MatMul, or the Gemm of a head. The new ones are called
            ``<path>/MatMul_quant``; a Gemm's bias becomes an Add behind it.
        rounded: by the name of a node what its weight was rounded to; by default :func:`round_blocks`.

    Weights that nothing reads any more stay until the caller drops them. Metadata of the model, if it has any, then say
    which operator and which release of ONNX Runtime it needs.

    Raises:
        ExportError: a model of the portable form, which has standard operators only; other bits; a node that is missing
            or no product with a float32 weight of the model.
    """
    if not bits:
        return
    metadata = {item.key: item.value for item in model.metadata_props}
    if metadata.get("form") == "portable":
        raise ExportError(
            f"expected standard operators only in the portable form, found weight-only linears, which need {OPERATOR} "
            "of ONNX Runtime; choose form onnxruntime, or float32 for these linears"
        )
    missing = sorted(set(bits) - {node.name for node in model.graph.node})
    if missing:
        raise ExportError(f"expected names of nodes, found {missing[0]!r}, which the graph does not have; correct it")
    weights = {item.name: item for item in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        copied = onnx.NodeProto.FromString(node.SerializeToString())  # the graph's own go below
        known = (rounded or {}).get(node.name)
        nodes += _replaced(model.graph, copied, weights, bits[node.name], known) if node.name in bits else [copied]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if DOMAIN not in {item.domain for item in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    if metadata:
        _say_what_it_needs(model, metadata, max(bits.values()))


def _replaced(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    weights: Mapping[str, onnx.TensorProto],
    bits: int,
    known: BlockWeights | None,
) -> list[onnx.NodeProto]:
    is_gemm = node.op_type == "Gemm"
    constant = weights.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
    transposed = {each.name: each.i for each in node.attribute}.get("transB", 0) == 1
    if constant is None or constant.data_type != onnx.TensorProto.FLOAT or is_gemm != transposed:
        raise ExportError(
            f"expected a MatMul of a float32 weight, or a Gemm with the transpose of one, in {node.name}, found "
            f"another {node.op_type}; choose linears of a float32 file"
        )
    array = numpy_helper.to_array(constant)
    weight = array if transposed else array.T  # [out, in]
    rounded = round_blocks(weight, bits) if known is None else known
    if (len(rounded.scales), rounded.n_inputs, rounded.bits) != (*weight.shape, bits):
        raise ExportError(
            f"expected {bits}-bit integers of a weight {weight.shape} for {node.name}, found those of another: "
            f"{(len(rounded.scales), rounded.n_inputs)} in {rounded.bits} bits; round it again"
        )
    path = node.name.rpartition("/")[0]
    name, product = f"{path}/MatMul_quant", node.output[0]
    tensors = [
        numpy_helper.from_array(rounded.packed, f"{name}.weight"),
        numpy_helper.from_array(rounded.scales, f"{name}.scales"),
    ]
    graph.initializer.extend(tensors)
    biases = list(node.input[2:])
    if biases:
        product = f"{name}_output_0"
    made = helper.make_node(
        OPERATOR,
        [node.input[0], *(tensor.name for tensor in tensors)],
        [product],
        name=name,
        domain=DOMAIN,
        K=rounded.n_inputs,
        N=len(rounded.scales),
        bits=bits,
        block_size=BLOCK_SIZE,
        accuracy_level=_INT8_COMPUTE,
    )
    adds = [helper.make_node("Add", [product, *biases], list(node.output), name=f"{path}/Add")] if biases else []
    return [made, *adds]


def _say_what_it_needs(model: onnx.ModelProto, metadata: dict[str, str], bits: int) -> None:
    contrib = {name for name in metadata.get("contrib_ops", "").split(", ") if name}
    metadata["contrib_ops"] = ", ".join(sorted(contrib | {OPERATOR}))
    releases = {metadata.get("onnxruntime", ">=1.0").removeprefix(">="), OLDEST_ENGINE[bits]}
    metadata["onnxruntime"] = f">={max(releases, key=_release)}"
    helper.set_model_props(model, metadata)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
