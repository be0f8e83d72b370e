"""A tiny exported classifier with calibration batches, and a look into quantized files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

from exporters import ExportSettings, dummy_inputs, export_encoder
from tests.helpers.models import tiny_inputs, tiny_model
from ziplm_deploy.compression.int8.quantize import quantize
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.recipe import Int8Config

Batch = dict[str, np.ndarray]
QUERY = "bert.encoder.layer.0.attention.self.query"
BATCH_SIZE, SEQ_LEN = 2, 9


@dataclass
class Exported:
    model: nn.Module
    path: Path
    batches: list[Batch]


def exported(folder: Path, shapes: str = "static", opset: int = 16, model: nn.Module | None = None) -> Exported:
    """A float32 file with the output ``logits`` or ``last_hidden_state``, and five batches."""
    model = model or tiny_model("bert", "text-classification", num_hidden_layers=2)
    settings = ExportSettings(shapes, opset, BATCH_SIZE, SEQ_LEN)  # type: ignore[arg-type]
    inputs = dummy_inputs(model, settings)
    with torch.no_grad():
        name = "logits" if "logits" in model(**inputs) else "last_hidden_state"
    path = folder / f"model-{shapes}.onnx"
    export_encoder(model, inputs, [name], path, settings)
    return Exported(model, path, [batch(model, seed, set(inputs)) for seed in range(5)])


def settings_of(config: Int8Config, engine: str = "onnxruntime", reduce_range: bool = True) -> Int8Settings:
    return Int8Settings(config, engine, reduce_range)


def int8(
    source: Exported,
    target: Path,
    config: Int8Config,
    engine: str = "onnxruntime",
    reduce_range: bool = True,
    **arguments: Any,
) -> Path:
    """``source`` quantized to ``target`` with its own batches."""
    quantize(source.path, target, settings_of(config, engine, reduce_range), **{"batches": source.batches, **arguments})
    return target


def batch(model: nn.Module, seed: int, names: set[str]) -> Batch:
    inputs = {name: tensor.numpy() for name, tensor in tiny_inputs(model, BATCH_SIZE, SEQ_LEN, seed).items()}
    if "token_type_ids" in names:
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    return inputs


def without_padding(batches: list[Batch]) -> list[Batch]:
    """The same batches with a token at every position."""
    return [{**each, "attention_mask": np.ones_like(each["attention_mask"])} for each in batches]


def tensors(values: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in values.items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(path: Path, values: Batch) -> np.ndarray:
    found: np.ndarray = session(path).run(None, values)[0]
    return found


def constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in graph.initializer}


def node_named(graph: onnx.GraphProto, ending: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name.endswith(ending))


def pair_parameters(path: Path) -> dict[str, dict[str, Any]]:
    """For every QDQ MatMul with a constant weight, by node name: integers and scales of weight and activation."""
    graph = onnx.load(str(path)).graph
    values, producers = constants(graph), {node.output[0]: node for node in graph.node}
    found = {}
    for node in graph.node:
        sides = [producers.get(name) for name in node.input]
        if node.op_type != "MatMul" or any(side is None or side.op_type != "DequantizeLinear" for side in sides):
            continue
        activation, weight = sides
        assert activation is not None
        assert weight is not None
        found[node.name] = {
            "activation_scale": values[activation.input[1]],
            "activation_zero_point": values[activation.input[2]],
            "weight": values[weight.input[0]],
            "weight_scale": values[weight.input[1]],
            "weight_zero_point": values[weight.input[2]],
        }
    return found


class Reader:
    """Batches as ONNX Runtime's calibrators take them."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches: Iterator[Batch] = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._batches, None)


def quantize_static(source: Path, target: Path, batches: list[Batch], **settings: Any) -> None:
    """ONNX Runtime's own static quantizer, of the MatMuls with constant weights inside layers, outputs in float32."""
    from onnxruntime.quantization import QuantType, quantize_static

    graph = onnx.load(str(source)).graph
    weights = constants(graph)
    linears = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            str(source),
            str(target),
            Reader(batches),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=linears,  # it would take products of two activations, too
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
            **settings,
        )
    finally:
        logging.disable(logging.NOTSET)
