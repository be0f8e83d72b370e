"""Small ONNX files made by hand: fast to write, with known answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def kernels_of(path: Path) -> Counter[str]:
    """How often each operator stands in the graph that a session of ONNX Runtime with default options runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that a file so optimized suits this machine only
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def write_mlp(
    path: Path, width: int, *, batch: int | str = "batch", tokens: int | str = "tokens", seed: int = 0, opset: int = 17
) -> Path:
    """``output = relu(E[ids] W) V · mask`` with ``width`` hidden columns; latency grows with it."""
    generator = np.random.default_rng(seed)
    weights = {
        "E": generator.standard_normal((32, 64), dtype=np.float32),
        "W": generator.standard_normal((64, width), dtype=np.float32),
        "V": generator.standard_normal((width, 64), dtype=np.float32),
        "axes": np.array([2]),
    }
    nodes = [
        helper.make_node("Gather", ["E", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "W"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "V"], ["y"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "axes"], ["mask"]),
        helper.make_node("Mul", ["y", "mask"], ["output"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [batch, tokens])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, tokens, 64])]
    return write(path, nodes, inputs, outputs, weights, opset)


def write_int8(path: Path, *, seed: int = 0) -> Path:
    """Two matrix products of 8-bit integers, quantized and dequantized around (QDQ): ``output = Q(Q(x) W) V``."""
    generator = np.random.default_rng(seed)
    nodes, weights, current = [], {}, "x"
    for layer in "WV":
        weights |= {
            layer: generator.integers(-127, 127, (64, 64), dtype=np.int8, endpoint=True),
            f"{layer} scale": np.float32(1 / 1024),
            f"{layer} zero": np.int8(0),
            f"{layer} in scale": np.float32(4 / 127),
            f"{layer} in zero": np.uint8(128),
        }
        quantized = [f"{layer} in scale", f"{layer} in zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [current, *quantized], [f"{layer} q"]),
            helper.make_node("DequantizeLinear", [f"{layer} q", *quantized], [f"{layer} dq"]),
            helper.make_node("DequantizeLinear", [layer, f"{layer} scale", f"{layer} zero"], [f"{layer} weight"]),
            helper.make_node("MatMul", [f"{layer} dq", f"{layer} weight"], [f"{layer} out"]),
        ]
        current = f"{layer} out"
    nodes.append(helper.make_node("Identity", [current], ["output"]))
    shape = ["batch", "tokens", 64]
    return write(
        path,
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )


def write_identity(path: Path, element_type: int, shape: list[int | str | None], name: str = "x") -> Path:
    """``output = input``: for the inputs that a worker makes."""
    return write(
        path,
        [helper.make_node("Identity", [name], ["output"])],
        [helper.make_tensor_value_info(name, element_type, shape)],
        [helper.make_tensor_value_info("output", element_type, shape)],
        {},
    )


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
    opset: int = 17,
) -> Path:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), str(path))
    return path
